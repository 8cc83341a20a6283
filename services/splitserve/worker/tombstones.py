"""Marks of attempts that ended: a late double of their job must not run again, its first token might differ."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from splitserve.protocol.messages import Refused


@dataclass(frozen=True, slots=True)
class Tombstone:
    """All attempts of a request up to `attempt` are over. `refused`: how the last one was refused, to be repeated."""

    attempt: int
    until: float
    refused: Refused | None


class Tombstones:
    """At most `capacity` marks, the oldest leave first, each for `seconds`."""

    def __init__(self, seconds: float, capacity: int) -> None:
        self._seconds = seconds
        self._capacity = capacity
        self._marks: OrderedDict[str, Tombstone] = OrderedDict()  # oldest first, so also by `until`

    def __len__(self) -> int:
        return len(self._marks)

    def put(self, rid: str, attempt: int, now: float, refused: Refused | None = None) -> None:
        """Attempts of `rid` up to `attempt` are over from now on."""
        old = self._marks.pop(rid, None)
        if old is not None and old.attempt > attempt:
            attempt, refused = old.attempt, old.refused
        self._marks[rid] = Tombstone(attempt, now + self._seconds, refused)
        while len(self._marks) > self._capacity:
            self._marks.popitem(last=False)

    def over(self, rid: str, attempt: int) -> Tombstone | None:
        """The mark that covers this attempt, if there is one."""
        mark = self._marks.get(rid)
        return mark if mark is not None and attempt <= mark.attempt else None

    def expire(self, now: float) -> None:
        while self._marks:
            rid, mark = next(iter(self._marks.items()))
            if mark.until > now:
                return
            del self._marks[rid]

    def next_expiry(self) -> float | None:
        return next(iter(self._marks.values())).until if self._marks else None
