"""What is remembered for whoever looks next: the last minute's numbers and the last requests that ended. Bounded, pure."""

from __future__ import annotations

from collections import deque

from splitserve.protocol.states import is_probe
from splitserve.router.records import Record
from splitserve.router.status.rolling import Durations, Rolling

KEPT = 40  # ended requests


class Recent:
    """Told by the router as things happen; a token costs one addition. Times are those of the router's core."""

    def __init__(self) -> None:
        self.ttft = Durations()
        self.gaps = Durations()
        self.tokens: Rolling[None] = Rolling()
        self.outcomes: Rolling[str] = Rolling()
        self.ended: deque[tuple[Record, float]] = deque(maxlen=KEPT)  # with the time of its end

    def saved(self, record: Record, now: float) -> None:
        """Any new state of a request; readiness probes are nobody's request."""
        if record.state.terminal and not is_probe(record.rid):
            self.ended.append((record, now))
            self.outcomes.add(record.state, now)
