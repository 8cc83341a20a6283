"""The router as the status page sees it: told what happens, asked what is so."""

from __future__ import annotations

import time
from collections.abc import Callable

from splitserve.protocol.status import RouterView
from splitserve.router.core import RouterCore
from splitserve.router.records import Record
from splitserve.router.status.feed import RecentObserver, StatusFeed
from splitserve.router.status.recent import Recent
from splitserve.router.status.snapshot import snapshot
from splitserve.telemetry.build import installed_version


class StatusSource:
    """One router's. `observer` is to be told what the endpoints measure."""

    def __init__(self, core: RouterCore, *, name: str, model: str) -> None:
        self._core = core
        self._name = name
        self._model = model
        self._began = time.monotonic()
        self._recent = Recent()
        self.observer = RecentObserver(self._recent)

    def saved(self, record: Record) -> None:
        """A request changed its state."""
        self._recent.saved(record, time.monotonic())

    def delivered(self, tokens: int) -> None:
        """Tokens went to a client."""
        self._recent.tokens.add(None, time.monotonic(), tokens)

    def feed(
        self, *, why_not_ready: Callable[[], str], bus_up: Callable[[], bool], degraded: Callable[[], bool]
    ) -> StatusFeed:
        """What viewers read."""
        release = installed_version()

        def look(now: float) -> object:
            router = RouterView(
                name=self._name,
                model=self._model,
                version=release,
                up_s=round(now - self._began, 1),
                why_not_ready=why_not_ready(),
                bus_up=bus_up(),
                degraded=degraded(),
            )
            return snapshot(self._core, self._recent, router, now)

        return StatusFeed(look)
