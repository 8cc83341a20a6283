"""Virtual time: a heap of calls. Nothing here sleeps, nothing reads a real clock."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """`now` in seconds since the world began; calls of one instant run in the order in which they were made."""

    __slots__ = ("_heap", "_order", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._order = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` at `when`; the past is now."""
        self._order += 1
        heappush(self._heap, (when if when > self.now else self.now, self._order, call, args))

    def after(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        self.at(self.now + delay, call, *args)

    def run(self, until: float) -> None:
        """Let time pass up to `until`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            when, _, call, args = heappop(heap)
            self.now = when
            call(*args)
        self.now = until
