"""Beats and metrics pages on a real bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from splitserve.bus.bus import Bus
from splitserve.protocol.messages import Beat, Message, MetricsGet, MetricsPage
from splitserve.protocol.subjects import Subjects
from splitserve.runtime.heartbeat import Heartbeat
from support.servers import Server
from support.waiting import until


class Beating:
    def __init__(self, bus: Bus) -> None:
        self.heard: list[Beat] = []
        self.lags: list[int] = []
        self.subjects = Subjects("hb-test")
        self.bus = bus
        self.heartbeat = Heartbeat(bus, self.subjects, self._make, self._hear, lambda: b"page\n", every_s=0.02)
        self.task = asyncio.create_task(self.heartbeat.run())

    def _make(self, lag_ms: int) -> Beat:
        self.lags.append(lag_ms)
        return Beat("w", "decode", 7, bus_lag_ms=lag_ms)

    def _hear(self, message: Message, _: str | None) -> None:
        assert isinstance(message, Beat)
        self.heard.append(message)


@asynccontextmanager
async def beating(url: str) -> AsyncGenerator[Beating]:
    bus = await Bus.connect(url, name="w-beats", role="decode", connect_timeout_s=10)
    made = Beating(bus)
    try:
        yield made
    finally:
        made.task.cancel()
        await asyncio.gather(made.task, return_exceptions=True)
        await bus.close()


async def test_a_worker_hears_its_own_beat_and_those_of_others(shared_nats: Server) -> None:
    async with beating(shared_nats.url) as made:
        await until(lambda: len(made.heard) >= 3, "three beats")
        await made.bus.publish(made.subjects.beat("router", "r1"), Beat("r1", "router", 1))
        await until(lambda: any(beat.name == "r1" for beat in made.heard), "the router's beat")
        assert {beat.incarnation for beat in made.heard if beat.name == "w"} == {7}


async def test_a_metrics_page_is_given_to_who_asks(shared_nats: Server) -> None:
    async with beating(shared_nats.url) as made:
        await until(lambda: bool(made.heard), "the first beat")
        answer = await made.bus.request(made.subjects.metrics("w"), MetricsGet(), 5)
        assert answer == MetricsPage("page\n", 7)


async def test_beats_pause_while_the_bus_is_away_and_come_again(own_nats: Server) -> None:
    own_nats.start()
    async with beating(own_nats.url) as made:
        await until(lambda: bool(made.heard), "the first beat")
        own_nats.kill()
        await until(lambda: not made.bus.connected, "the connection is seen to be lost")
        count = len(made.heard)
        tries = len(made.lags)
        await until(lambda: len(made.lags) > tries + 2, "beats that do not get out")
        assert len(made.heard) == count
        own_nats.start()
        await until(lambda: len(made.heard) > count, "beats again", 20)
