"""What all requests of one router share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from splitserve.config import RoutingSettings
from splitserve.router.chores import Chores
from splitserve.router.fleet import Fleet
from splitserve.router.inbox import Inbox
from splitserve.router.outbox import Outbox
from splitserve.router.rules import Rules
from splitserve.router.scout import Scout


class Wait(StrEnum):
    """A request's timers: each of its waits has one (invariant 9)."""

    DEADLINE = "deadline"
    AGE = "age"  # without a decode worker
    PROGRESS = "progress"  # of the prefill
    FORWARD = "forward"  # decode says nothing of the KvReady
    AGAIN = "again"  # our bus was down for a moment


@dataclass(frozen=True, slots=True)
class LifeTimer:
    rid: str
    wait: Wait


@dataclass(slots=True)
class Desk:
    """The parts that a request's life uses. None of them knows a request."""

    settings: RoutingSettings
    rules: Rules
    outbox: Outbox
    fleet: Fleet
    inbox: Inbox
    chores: Chores
    scout: Scout
    queue: Queue
    bus_down: bool = False

    @property
    def now(self) -> float:
        return self.outbox.now

    def timer(self, rid: str, wait: Wait, seconds: float) -> None:
        self.outbox.timers.set(LifeTimer(rid, wait), self.now + seconds)

    def no_timer(self, rid: str, wait: Wait) -> None:
        self.outbox.timers.clear(LifeTimer(rid, wait))

    @property
    def bus_sick(self) -> bool:
        return self.bus_down or self.fleet.sick(self.now)


class Queue:
    """Requests without a decode worker, oldest and most urgent first. `serve`: somebody may be placed now."""

    def __init__(self) -> None:
        self.tokens = 0
        self.serve = False
        self._waiting: dict[str, tuple[int, float, int]] = {}  # rid -> (priority, since, prompt tokens)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, rid: str) -> bool:
        return rid in self._waiting

    def join(self, rid: str, priority: int, since: float, tokens: int) -> bool:
        """False: it waits already."""
        self.serve = True
        if rid in self._waiting:
            return False
        self._waiting[rid] = (priority, since, tokens)
        self.tokens += tokens
        return True

    def part(self, rid: str) -> bool:
        """False: it did not wait."""
        entry = self._waiting.pop(rid, None)
        if entry is None:
            return False
        self.tokens -= entry[2]
        return True

    def in_order(self) -> list[str]:
        """A lower priority number goes first; then who came first."""
        return sorted(self._waiting, key=self._waiting.__getitem__)
