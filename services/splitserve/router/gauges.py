"""What a router's page shows of now, read off when the page is asked for: who lives, what waits, how the bus is."""

from __future__ import annotations

from collections import Counter as Count
from dataclasses import dataclass, field

from splitserve.protocol.states import RequestState, Role
from splitserve.router.dispatcher import Dispatcher
from splitserve.store.store import Store
from splitserve.telemetry.metrics import Metrics


@dataclass
class Rising:
    """Counters that somebody else counts: what came since the last look is added to ours."""

    seen: dict[str, int] = field(default_factory=dict[str, int])

    def since(self, what: str, now: int) -> int:
        before, self.seen[what] = self.seen.get(what, 0), now
        return now - before


class Gauges:
    """`refresh` sets everything."""

    def __init__(self, metrics: Metrics, dispatcher: Dispatcher, store: Store) -> None:
        self._dispatcher = dispatcher
        self._store = store
        self._rising = Rising()
        self._live = {
            state: metrics.gauge("splitserve_requests", state=state) for state in RequestState if not state.terminal
        }
        self._workers = {role: metrics.gauge("splitserve_workers", role=role) for role in (Role.PREFILL, Role.DECODE)}
        self._degraded = metrics.gauge("splitserve_state_degraded")
        self._bus_errors = metrics.counter("splitserve_bus_errors")
        self._bus_reconnects = metrics.counter("splitserve_bus_reconnects")

    def refresh(self) -> None:
        states, roles = Count(self._dispatcher.live_states()), Count(self._dispatcher.live_roles())
        for state, gauge in self._live.items():
            gauge.set(states[state])
        for role, gauge in self._workers.items():
            gauge.set(roles[role])
        self._degraded.set(self._store.degraded)
        bus = self._dispatcher.bus.counters
        self._bus_errors.inc(self._rising.since("errors", bus.errors))
        self._bus_reconnects.inc(self._rising.since("reconnects", bus.reconnects))
