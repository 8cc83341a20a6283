"""Named instants: a heap in which setting a name again moves it."""

from __future__ import annotations

import heapq
from collections.abc import Hashable


class Timers:
    """Each key has at most one instant."""

    def __init__(self) -> None:
        self._at: dict[Hashable, float] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._count = 0  # breaks ties in the order of setting; keys need not compare

    def set(self, key: Hashable, at: float) -> None:
        self._at[key] = at
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, key))

    def clear(self, key: Hashable) -> None:
        self._at.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._at

    def __len__(self) -> int:
        return len(self._at)

    def next_at(self) -> float | None:
        """The earliest instant, None when nothing is set."""
        while self._heap:
            at, _, key = self._heap[0]
            if self._at.get(key) == at:
                return at
            heapq.heappop(self._heap)
        return None

    def take_due(self, now: float) -> list[Hashable]:
        """Keys whose instant has come, earliest first; they are cleared."""
        due: list[Hashable] = []
        while (at := self.next_at()) is not None and at <= now:
            key = heapq.heappop(self._heap)[2]
            del self._at[key]
            due.append(key)
        return due
