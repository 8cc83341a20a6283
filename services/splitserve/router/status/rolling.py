"""Counts of the last minute, a slot a second: adding costs one dictionary entry, reading is for those who look. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from math import exp, floor, log
from typing import Generic, TypeVar

KEPT_S = 60
RATIO = log(1.05)  # of neighbouring buckets: a median is off by 2.5 % at most
LEAST_S = 1e-6

K = TypeVar("K", bound=Hashable)


class Rolling(Generic[K]):
    """How often each key came. `now` never goes back. The second under way is read by nobody, so that rates are right."""

    def __init__(self) -> None:
        self._slots: deque[tuple[int, Counter[K]]] = deque(maxlen=KEPT_S + 1)
        self._second = -1
        self._latest: Counter[K] = Counter()  # of that second

    def add(self, key: K, now: float, amount: int = 1) -> None:
        if (second := int(now)) != self._second:
            self._second, self._latest = second, Counter()
            self._slots.append((second, self._latest))
        self._latest[key] += amount

    def counts(self, now: float, seconds: int = KEPT_S) -> Counter[K]:
        """Of the last whole `seconds`, at most 60."""
        end = floor(now)
        total: Counter[K] = Counter()
        for second, counts in self._slots:
            if end - seconds <= second < end:
                total.update(counts)
        return total


class Durations:
    """Durations of the last minute in geometric buckets."""

    def __init__(self) -> None:
        self._rolling: Rolling[int] = Rolling()
        self._count = self._rolling.add

    def add(self, seconds: float, now: float) -> None:
        self._count(round(log(seconds if seconds > LEAST_S else LEAST_S) / RATIO), now)

    def median(self, now: float) -> float | None:
        """In seconds; None when there was none."""
        counts = self._rolling.counts(now)
        half = counts.total() / 2
        for bucket in sorted(counts):
            half -= counts[bucket]
            if half <= 0:
                return exp(bucket * RATIO)
        return None
