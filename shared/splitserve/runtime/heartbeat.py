"""Beats, on a connection of their own so that load cannot starve them; metrics pages are asked for there too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from math import inf

from splitserve.bus.bus import Bus
from splitserve.errors import BusUnavailable
from splitserve.protocol.messages import Beat, Message, MetricsGet, MetricsPage
from splitserve.protocol.subjects import Subjects

log = logging.getLogger("splitserve.runtime")

BEAT_S = 0.5


class Heartbeat:
    """Publishes `make(bus_lag_ms)` every half second and passes on every beat that it hears, its own included.

    `round_trip` is told the seconds between sending a beat and hearing it.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        make: Callable[[int], Beat],
        hear: Callable[[Message, str | None], None],
        page: Callable[[], bytes],
        every_s: float = BEAT_S,
        round_trip: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._make = make
        self._hear = hear
        self._page = page
        self._every_s = every_s
        self._round_trip = round_trip
        self._loop = asyncio.get_running_loop()
        self._sent_at = inf
        self._lag_s = 0.0
        self._life: tuple[str, int] = ("", 0)
        self._answering: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled. While the bus is away no beat goes out, which is what a beat's absence means."""
        first = self._make(0)
        self._life = (first.name, first.incarnation)
        await self._bus.subscribe(self._subjects.all_beats, self._on_beat)
        await self._bus.subscribe(self._subjects.metrics(first.name), self._on_metrics)
        subject = self._subjects.beat(first.role, first.name)
        at = self._loop.time()
        while True:
            try:
                await self._bus.publish(subject, self._make(round(self._lag_s * 1000)))
                self._sent_at = self._loop.time()
            except BusUnavailable as error:
                log.debug("beat lost", extra={"why": error.message})
            at = max(at + self._every_s, self._loop.time())  # after a freeze: one, not all that were missed
            await asyncio.sleep(at - self._loop.time())

    def _on_beat(self, message: Message, reply_to: str | None) -> None:
        if isinstance(message, Beat) and (message.name, message.incarnation) == self._life:
            self._lag_s = max(0.0, self._loop.time() - self._sent_at)
            self._round_trip(self._lag_s)
        self._hear(message, reply_to)

    def _on_metrics(self, message: Message, reply_to: str | None) -> None:
        if isinstance(message, MetricsGet) and reply_to is not None:
            task = asyncio.create_task(self._answer(reply_to), name="metrics-page")
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, reply_to: str) -> None:
        try:
            await self._bus.answer(reply_to, MetricsPage(self._page().decode(), self._life[1]))
        except BusUnavailable as error:
            log.debug("metrics page lost", extra={"why": error.message})
