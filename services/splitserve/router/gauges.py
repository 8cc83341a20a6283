"""What a router's page shows of now, read off when the page is asked for: who lives, what waits, what happened since."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Mapping

from splitserve.protocol.states import RequestState, Role, is_probe
from splitserve.router.dispatcher import Dispatcher
from splitserve.store.store import Store
from splitserve.telemetry.metrics import Metrics, Rising

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
    ("moved", "moved"),
)


class Gauges:
    """`refresh` sets everything."""

    def __init__(self, metrics: Metrics, dispatcher: Dispatcher, store: Store) -> None:
        self._dispatcher = dispatcher
        self._store = store
        self._happened = Happened(metrics)
        self._seen: Count[str] = Count()  # of the core's counts, at the last look
        self._live = {
            state: metrics.gauge("splitserve_requests", state=state) for state in RequestState if not state.terminal
        }
        self._workers = {role: metrics.gauge("splitserve_workers", role=role) for role in (Role.PREFILL, Role.DECODE)}
        self._oldest = metrics.gauge("splitserve_oldest_request_age_seconds")
        self._degraded = metrics.gauge("splitserve_state_degraded")
        bus = dispatcher.bus.counters
        self._rising = (
            Rising(metrics.counter("splitserve_bus_errors").inc, lambda: bus.errors),
            Rising(metrics.counter("splitserve_bus_reconnects").inc, lambda: bus.reconnects),
        )

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
        for counter in self._rising:
            counter.refresh()
        counts = Count(self._dispatcher.counts())
        for what, rose in (counts - self._seen).items():
            self._happened.rose(what, rose)
        self._seen = counts


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
