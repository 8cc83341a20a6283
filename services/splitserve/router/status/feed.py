"""Snapshots for whoever looks: made at most once a second however many look, and not at all while nobody does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import orjson

from splitserve.errors import Overloaded
from splitserve.router.observe import NullObserver
from splitserve.router.status.recent import Recent

EVERY_S = 1.0
VIEWERS = 32


class StatusFeed:
    """`look` gives what is to be shown at a time of `time.monotonic()`: dataclasses and plain values."""

    def __init__(self, look: Callable[[float], object], *, every_s: float = EVERY_S, viewers: int = VIEWERS) -> None:
        self._look = look
        self._every_s = every_s
        self._most = viewers
        self._viewers = 0
        self._closing = asyncio.Event()
        self._page = b""
        self._taken_at = float("-inf")

    def page(self) -> bytes:
        """The present snapshot as JSON, at most `every_s` old."""
        now = time.monotonic()
        if now - self._taken_at >= self._every_s:
            self._page, self._taken_at = orjson.dumps(self._look(now)), now
        return self._page

    @asynccontextmanager
    async def viewing(self) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
        """Pages, one each `every_s`, until `close`. Raises Overloaded when too many look already."""
        if self._viewers >= self._most:
            raise Overloaded(f"{self._viewers} viewers watch already, the most there may be", retry_after_s=10)
        self._viewers += 1
        try:
            yield self._pages()
        finally:
            self._viewers -= 1

    async def _pages(self) -> AsyncGenerator[bytes, None]:
        while not self._closing.is_set():
            yield self.page()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._every_s)

    def close(self) -> None:
        """End every stream: the router leaves."""
        self._closing.set()


class RecentObserver(NullObserver):
    """Tells `Recent` what the endpoints measure."""

    def __init__(self, recent: Recent) -> None:
        self._recent = recent

    def request(self, endpoint: str) -> RecentObserver:
        return self

    def first_token(self, seconds: float) -> None:
        self._recent.ttft.add(seconds, time.monotonic())

    def gaps(self, seconds: Sequence[float]) -> None:
        now = time.monotonic()
        for gap in seconds:
            self._recent.gaps.add(gap, now)
