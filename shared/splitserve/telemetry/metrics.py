"""The metrics of one process: an explicit registry, children resolved once, no look-up by label on a hot path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from splitserve.protocol.states import Role
from splitserve.telemetry.families import Family, Kind, Owner, families

CONTENT_TYPE = CONTENT_TYPE_LATEST
_MADE = {Kind.COUNTER: Counter, Kind.GAUGE: Gauge, Kind.HISTOGRAM: Histogram}
_OWNED: Mapping[Role, frozenset[Owner]] = {
    Role.ROUTER: frozenset({Owner.ROUTER, Owner.ALL}),
    Role.PREFILL: frozenset({Owner.PREFILL, Owner.WORKER, Owner.ALL}),
    Role.DECODE: frozenset({Owner.DECODE, Owner.WORKER, Owner.ALL}),
}
_M = TypeVar("_M", Counter, Gauge, Histogram)


class Metrics:
    """All families that `role` owns, with `model_name` and `engine` set. Families without labels are exported from the start."""

    def __init__(self, role: Role, *, model_name: str, engine: str, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        self._constant = {"model_name": model_name, "engine": engine}
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        for family in families(max_model_len):
            if family.owner in _OWNED[role]:
                self._made[family.name] = self._make(family)

    def _make(self, family: Family) -> Counter | Gauge | Histogram:
        labels = (*self._constant, *family.labels)
        if family.kind is Kind.HISTOGRAM:
            made = Histogram(family.name, family.help, labels, buckets=family.buckets, registry=self.registry)
        else:
            made = _MADE[family.kind](family.name, family.help, labels, registry=self.registry)
        if not family.labels:
            made.labels(**self._constant)
        return made

    def _child(self, kind: type[_M], name: str, labels: Mapping[str, str]) -> _M:
        child = self._made[name].labels(**self._constant, **labels)
        if not isinstance(child, kind):
            raise TypeError(f"{name} is a {type(child).__name__}, not a {kind.__name__}")
        return child

    def counter(self, name: str, **labels: str) -> Counter:
        """The child of a counter family; resolve once and keep. KeyError for a family of another role."""
        return self._child(Counter, name, labels)

    def gauge(self, name: str, **labels: str) -> Gauge:
        """The child of a gauge family; resolve once and keep."""
        return self._child(Gauge, name, labels)

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The child of a histogram family; resolve once and keep."""
        return self._child(Histogram, name, labels)

    def page(self) -> bytes:
        """The text exposition of this process."""
        return generate_latest(self.registry)
