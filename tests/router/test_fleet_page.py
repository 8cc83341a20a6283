"""The fleet's page over a real bus: who is slow, who is dead, and how often anybody is asked."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from splitserve.bus.bus import Bus
from splitserve.protocol.messages import Message, MetricsPage, Pong
from splitserve.protocol.subjects import Subjects
from splitserve.router import fleet_page
from splitserve.router.account import Life
from splitserve.router.exposition import OPENMETRICS, TEXT
from splitserve.router.fleet_page import FleetPage
from support.servers import Server
from support.waiting import until


def text(engine: str, tokens: int) -> str:
    return (
        f'# HELP tokens_total T.\n# TYPE tokens_total counter\ntokens_total{{engine="{engine}"}} {tokens}.0\n'
        f'# HELP running R.\n# TYPE running gauge\nrunning{{engine="{engine}"}} 1.0\n'
    )


@dataclass
class Stage:
    """A page, and workers that the test plays. `hold`: they take the question and do not answer."""

    bus: Bus
    subjects: Subjects
    page: FleetPage = field(init=False)
    lives: list[Life] = field(default_factory=list[Life])
    tokens: int = 1
    asked: int = 0
    hold: bool = False
    wrong: bool = False

    def __post_init__(self) -> None:
        self.page = FleetPage(
            self.bus, self.subjects, lives=lambda: list(self.lives), own=lambda: text("r0", 0).encode()
        )

    async def worker(self, name: str, incarnation: int = 1) -> None:
        async def answer(reply_to: str) -> None:
            message = Pong(1) if self.wrong else MetricsPage(text(name, self.tokens), incarnation)
            await self.bus.answer(reply_to, message)

        def on_get(_: Message, reply_to: str | None) -> None:
            self.asked += 1
            if reply_to is not None and not self.hold:
                tasks.add(asyncio.create_task(answer(reply_to)))

        tasks: set[asyncio.Task[None]] = set()
        await self.bus.subscribe(self.subjects.metrics(name), on_get)
        self.lives.append((name, incarnation))

    async def shown(self, accept: str = "") -> str:
        body, _ = await self.page.page(accept)
        return body.decode()


@pytest.fixture
async def stage(shared_nats: Server) -> AsyncGenerator[Stage]:
    bus = await Bus.connect(shared_nats.url, name="r0", role="router", connect_timeout_s=10)
    yield Stage(bus, Subjects(f"t-{secrets.token_hex(4)}"))
    await bus.close()


@pytest.fixture
def always_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page is pulled anew."""
    monkeypatch.setattr(fleet_page, "FRESH_S", 0.0)


@asynccontextmanager
async def pulling(page: FleetPage) -> AsyncGenerator[None]:
    task = asyncio.create_task(page.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_all_who_live_are_on_the_page(stage: Stage) -> None:
    await stage.worker("d0")
    await stage.worker("p0")
    shown = await stage.shown()
    for engine in ("r0", "d0", "p0"):
        assert f'tokens_total{{engine="{engine}"}}' in shown
    assert shown.count("# TYPE tokens_total counter") == 1


async def test_many_who_ask_at_once_cost_one_pull_and_a_fresh_page_costs_none(stage: Stage) -> None:
    await stage.worker("d0")
    await asyncio.gather(*(stage.shown() for _ in range(20)))
    await stage.shown()
    assert stage.asked == 1


async def test_who_leaves_before_the_answer_spoils_no_other_scrape(stage: Stage) -> None:
    await stage.worker("d0")
    first = asyncio.create_task(stage.shown())
    second = asyncio.create_task(stage.shown())
    await asyncio.sleep(0)
    first.cancel()
    assert 'engine="d0"' in await second


@pytest.mark.usefixtures("always_stale")
async def test_a_worker_that_does_not_answer_is_shown_as_last_seen(stage: Stage) -> None:
    await stage.worker("d0")
    before = await stage.shown()
    stage.hold = True
    stage.tokens = 99
    assert await stage.shown() == before
    assert stage.asked == 2


@pytest.mark.usefixtures("always_stale")
async def test_an_answer_that_is_no_page_changes_nothing(stage: Stage) -> None:
    await stage.worker("d0")
    before = await stage.shown()
    stage.wrong = True
    assert await stage.shown() == before


@pytest.mark.usefixtures("always_stale")
async def test_who_listens_no_more_is_dead_before_its_beats_say_so(stage: Stage) -> None:
    stage.lives.append(("d9", 1))
    await stage.worker("d0")
    assert 'running{engine="d0"}' in await stage.shown()
    stage.lives.remove(("d0", 1))
    shown = await stage.shown()
    assert 'running{engine="d0"}' not in shown
    assert 'tokens_total{engine="d0"}' in shown


async def test_pages_are_pulled_though_nobody_asks(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_page, "PULL_S", 0.01)
    monkeypatch.setattr(fleet_page, "FRESH_S", 0.0)
    await stage.worker("d0")
    async with pulling(stage.page):
        await until(lambda: stage.asked >= 3, "three pulls")


async def test_while_the_bus_is_away_the_last_pages_stay(own_nats: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_page, "FRESH_S", 0.0)
    own_nats.start()
    bus = await Bus.connect(own_nats.url, name="r0", role="router", connect_timeout_s=10)
    try:
        stage = Stage(bus, Subjects("away"))
        await stage.worker("d0")
        before = await stage.shown()
        own_nats.kill()
        await until(lambda: not bus.connected, "the connection is seen to be lost")
        assert await stage.shown() == before
    finally:
        await bus.close()


async def test_the_format_is_the_scrapers_choice(stage: Stage) -> None:
    assert (await stage.page.page(""))[1] == TEXT
    body, kind = await stage.page.page("application/openmetrics-text;version=1.0.0")
    assert (kind, body[-6:]) == (OPENMETRICS, b"# EOF\n")
