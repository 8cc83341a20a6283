"""What a router's page shows of now, read off when the page is asked for: who lives, what waits, what happened since."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from splitserve.protocol.states import RequestState, Role, is_probe
from splitserve.router.dispatcher import Dispatcher
from splitserve.store.store import Store
from splitserve.telemetry.metrics import Metrics

# why a worker was given up, in the core's words -> the label; the first that begins so
_CAUSES = (
    ("worker lost", "worker_lost"),
    ("refused", "refused"),
    ("no answer", "no_answer"),
    ("unknown there", "unknown"),
    ("not in the digest", "unknown"),
    ("no progress", "no_progress"),
    ("preempted", "preempted"),
    ("outage", "outage"),
    ("kv ", "kv_failed"),
)


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
        self._happened = Happened(metrics)
        self._live = {
            state: metrics.gauge("splitserve_requests", state=state) for state in RequestState if not state.terminal
        }
        self._workers = {role: metrics.gauge("splitserve_workers", role=role) for role in (Role.PREFILL, Role.DECODE)}
        self._oldest = metrics.gauge("splitserve_oldest_request_age_seconds")
        self._degraded = metrics.gauge("splitserve_state_degraded")
        self._bus_errors = metrics.counter("splitserve_bus_errors")
        self._bus_reconnects = metrics.counter("splitserve_bus_reconnects")

    def refresh(self) -> None:
        live = self._dispatcher.live_requests()
        states = Count(state for rid, state in live.items() if not is_probe(rid))
        roles = Count(self._dispatcher.live_roles())
        for state, gauge in self._live.items():
            gauge.set(states[state])
        for role, gauge in self._workers.items():
            gauge.set(roles[role])
        self._oldest.set(self._dispatcher.oldest_age_s())
        self._degraded.set(self._store.degraded)
        bus = self._dispatcher.bus.counters
        self._bus_errors.inc(self._rising.since("errors", bus.errors))
        self._bus_reconnects.inc(self._rising.since("reconnects", bus.reconnects))
        for what, now in self._dispatcher.counts().items():
            rose = self._rising.since(what, now)
            if rose:
                self._happened.rose(what, rose)


class Happened:
    """The core's counts that have a series: `resumes`, `placed|decision|why`, `replaced|phase|cause`, `state->cancelled`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._resumes = metrics.counter("splitserve_resumes")
        self._series: Mapping[str, Callable[[str, str], tuple[str, dict[str, str]]]] = {
            "placed": lambda decision, why: ("splitserve_placements", {"decision": decision, "reason": why}),
            "replaced": lambda phase, cause: ("splitserve_replacements", {"phase": phase, "reason": reason_of(cause)}),
        }

    def rose(self, what: str, by: int) -> None:
        before, _, after = what.partition("->")
        if after == RequestState.CANCELLED:
            self._metrics.counter("splitserve_requests_cancelled", state=before).inc(by)
        kind, _, rest = what.partition("|")
        if kind == "resumes":
            self._resumes.inc(by)
        elif kind in self._series:
            name, labels = self._series[kind](*rest.split("|", 1))
            self._metrics.counter(name, **labels).inc(by)


def reason_of(cause: str) -> str:
    """The label for a cause; `other` for one that nobody thought of."""
    return next((label for begin, label in _CAUSES if cause.startswith(begin)), "other")
