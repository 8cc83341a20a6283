"""A deadline is a value: an instant on one monotonic clock, and whose wait it bounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at` in seconds of the clock that `now` is read from; `what` names the wait in messages."""

    at: float
    what: str

    @classmethod
    def after(cls, seconds: float, now: float, what: str) -> Deadline:
        return cls(now + seconds, what)

    def left(self, now: float) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - now)

    def over(self, now: float) -> bool:
        return now >= self.at
