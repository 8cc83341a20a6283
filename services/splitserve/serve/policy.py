"""When a child process is started again, killed, or given up: pure, one `ChildPolicy` a child."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from enum import StrEnum

from splitserve.errors import TABLE, NeverReady, StartupError

_BY_EXIT_CODE = {
    row.exit_code: row.error for row in TABLE if issubclass(row.error, StartupError) and row.error is not StartupError
}

_MOST_DOUBLINGS = 30  # of a pause: years


@dataclass(frozen=True, slots=True)
class Rules:
    """Seconds, and how many starts may fail of a child that was never ready. One that was is started again for ever, after
    longer and longer pauses: the others serve meanwhile."""

    start_s: float = 600.0
    stuck_s: float = 30.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    calm_s: float = 60.0  # ready for so long: earlier failures are forgotten
    failed_starts: int = 3


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    PAUSED = "paused"  # until `restart_at`


@dataclass(frozen=True, slots=True)
class Start:
    """Command: start the child (again)."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Command: kill the child; its exit is reported like any other."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Command: stop the whole with this error."""

    error: StartupError


Command = Start | Kill | GiveUp


@dataclass(slots=True)
class ChildPolicy:
    """The life of one child, over all its starts. Times are of one monotonic clock."""

    name: str
    rules: Rules
    phase: Phase = Phase.PAUSED
    since: float = 0.0  # when the phase began
    restart_at: float = 0.0
    ever_ready: bool = False
    failures: int = field(default=0)  # in a row
    _killed: bool = False

    def started(self, now: float) -> None:
        self.phase, self.since, self._killed = Phase.STARTING, now, False

    def ready(self, now: float) -> bool:
        """The child says that it is ready. True the first time in this life."""
        if self.phase is not Phase.STARTING:
            return False
        self.phase, self.since, self.ever_ready = Phase.READY, now, True
        return True

    def step_age(self, age_s: float) -> list[Command]:
        """The child's beat says how long the step under way has been running."""
        if age_s < self.rules.stuck_s:
            return []
        return self._kill(f"its step has been running for {age_s:.0f} s (limit {self.rules.stuck_s:g} s)")

    def tick(self, now: float) -> list[Command]:
        if self.phase is Phase.PAUSED and now >= self.restart_at:
            return [Start()]
        if self.phase is Phase.STARTING and now - self.since > self.rules.start_s:
            reason = f"was not ready in {self.rules.start_s:g} s"
            if self.ever_ready:
                return self._kill(reason)
            return [GiveUp(NeverReady(f"{self.name} {reason}; what it said is above; --start-timeout gives it longer"))]
        return []

    def exited(self, now: float, code: int, last_words: str) -> list[Command]:
        """The child ended without being asked to. `last_words`: its own line about it, if any."""
        was_ready = self.phase is Phase.READY
        if was_ready and now - self.since >= self.rules.calm_s:
            self.failures = 0
        self.failures += 1
        if not self.ever_ready and code in _BY_EXIT_CODE:
            return [GiveUp(_BY_EXIT_CODE[code](f"{self.name} cannot start: {last_words or how_it_ended(code)}"))]
        if not self.ever_ready and self.failures >= self.rules.failed_starts:
            why = f"{how_it_ended(code)}{f': {last_words}' if last_words else ''}"
            return [GiveUp(NeverReady(f"{self.name} did not become ready in {self.failures} starts; it {why}"))]
        doublings = min(self.failures - 1, _MOST_DOUBLINGS)
        pause = min(self.rules.first_pause_s * 2**doublings, self.rules.longest_pause_s)
        self.phase, self.since, self.restart_at = Phase.PAUSED, now, now + pause
        return []

    def _kill(self, reason: str) -> list[Command]:
        if self._killed:
            return []
        self._killed = True
        return [Kill(reason)]


def how_it_ended(code: int) -> str:
    """An exit code in words; negative is a signal, as asyncio reports it."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
