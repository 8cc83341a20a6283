"""`GET /metrics`: pulls the pages of all workers and other routers over the bus and shows them as one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from splitserve.bus.bus import Bus, NoResponders
from splitserve.errors import BusUnavailable, ProtocolError
from splitserve.protocol.messages import MetricsGet, MetricsPage
from splitserve.protocol.subjects import Subjects
from splitserve.router.account import Life
from splitserve.router.exposition import content_type, written
from splitserve.router.federation import Federation

log = logging.getLogger("splitserve.router")

FRESH_S = 1.0  # a page is good for so long
DEADLINE_S = 0.5  # who does not answer by then is shown as last seen
PULL_S = 5.0  # pulled also when nobody asks: a death loses what came after the last pull


class FleetPage:
    """One pull is under way at most, however many ask. `lives`: who beats now; `own`: this router's page."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        lives: Callable[[], Iterable[Life]],
        own: Callable[[], bytes],
        federation: Federation | None = None,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._lives = lives
        self._own = own
        self._federation = federation or Federation()
        self._loop = asyncio.get_running_loop()
        self._pulled_at = float("-inf")
        self._pulling: asyncio.Task[None] | None = None
        self._written: dict[str, bytes] = {}  # what the last pull gave, by content type

    async def run(self) -> None:
        """Pull every `PULL_S`, until cancelled."""
        try:
            while True:
                await self._fresh()
                await asyncio.sleep(PULL_S)
        finally:
            if self._pulling is not None:
                self._pulling.cancel()
                await asyncio.gather(self._pulling, return_exceptions=True)

    async def page(self, accept: str) -> tuple[bytes, str]:
        """The page, at most `FRESH_S` old, in the format that `accept` asks for, and its content type."""
        await self._fresh()
        kind = content_type(accept)
        if kind not in self._written:
            self._written[kind] = written(self._federation.page(self._own().decode()), kind)
        return self._written[kind], kind

    async def _fresh(self) -> None:
        if self._loop.time() - self._pulled_at < FRESH_S:
            return
        if self._pulling is None or self._pulling.done():
            self._pulling = asyncio.create_task(self._pull(), name="fleet-page")
        await asyncio.shield(self._pulling)  # a scraper that leaves does not end the others' pull

    async def _pull(self) -> None:
        lives = list(self._lives())
        answers = await asyncio.gather(*(self._ask(name) for name, _ in lives))
        gone = {life for life, there in zip(lives, answers, strict=True) if not there}
        self._federation.living((life for life in self._lives() if life not in gone), self._loop.time())
        self._pulled_at = self._loop.time()
        self._written.clear()

    async def _ask(self, name: str) -> bool:
        """Take one process's page. False: the bus knows of nobody by that name."""
        try:
            answer = await self._bus.request(self._subjects.metrics(name), MetricsGet(), DEADLINE_S)
            if not isinstance(answer, MetricsPage):
                raise ProtocolError(f"a {type(answer).__name__} where a MetricsPage was asked for")
            self._federation.took((name, answer.incarnation), answer.text)
        except NoResponders:
            return False
        except (BusUnavailable, ProtocolError, ValueError) as error:
            log.debug("no metrics page", extra={"worker": name, "why": str(error)})
        return True
