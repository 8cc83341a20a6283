"""The metrics of one process: explicit registries, children resolved once, no look-up by label on a hot path."""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import prometheus_client
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    Summary,
)
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from splitserve.protocol.states import Role
from splitserve.telemetry.build import installed_version
from splitserve.telemetry.families import Family, Kind, Owner, families
from splitserve.telemetry.legacy import LegacyCollector

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_MADE = {Kind.COUNTER: Counter, Kind.GAUGE: Gauge, Kind.SUMMARY: Summary}
OWNED: Mapping[Role, frozenset[Owner]] = {
    Role.ROUTER: frozenset({Owner.ROUTER, Owner.ALL}),
    Role.PREFILL: frozenset({Owner.PREFILL, Owner.WORKER, Owner.ALL}),
    Role.DECODE: frozenset({Owner.DECODE, Owner.WORKER, Owner.ALL}),
}
_Any = Counter | Gauge | Histogram | Summary
_M = TypeVar("_M", Counter, Gauge, Histogram, Summary)

Page = Callable[[str], tuple[bytes, str]]  # an Accept header -> a page and its content type


class Metrics:
    """All families that `role` owns, with what each says of this process (`identity`) set; known series are exported from
    the start. `legacy` adds vLLM's older names."""

    def __init__(self, role: Role, *, model_name: str, engine: str, max_model_len: int, legacy: bool = False) -> None:
        prometheus_client.disable_created_metrics()  # a setting of the library, not of a registry
        self.registry = CollectorRegistry()
        self._identity = {"model_name": model_name, "engine": engine}
        self._families = {f.name: f for f in families(max_model_len) if f.owner in OWNED[role]}
        self._made = {family.name: self._make(family) for family in self._families.values()}
        self._older = LegacyCollector(self.registry, model_name, zeros=role is not Role.ROUTER) if legacy else None
        self._process = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)
        self.gauge(
            "splitserve_build_info", version=installed_version(), role=role, python=platform.python_version()
        ).set(1)

    def _make(self, family: Family) -> _Any:
        labels = (*family.identity, *family.labels)
        if family.kind is Kind.HISTOGRAM:
            made: _Any = Histogram(family.name, family.help, labels, buckets=family.buckets, registry=self.registry)
        else:
            made = _MADE[family.kind](family.name, family.help, labels, registry=self.registry)
        for series in family.known:
            child = made.labels(*self._values(family), *series.values) if labels else made
            if series.value and isinstance(child, Gauge):
                child.set(series.value)
        return made

    def _values(self, family: Family) -> tuple[str, ...]:
        return tuple(self._identity[label] for label in family.identity)

    def _child(self, kind: type[_M], name: str, labels: Mapping[str, str]) -> _M:
        made, family = self._made[name], self._families[name]
        named = {**{label: self._identity[label] for label in family.identity}, **labels}
        child = made.labels(**named) if named else made
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

    def summary(self, name: str, **labels: str) -> Summary:
        """The child of a summary family; resolve once and keep."""
        return self._child(Summary, name, labels)

    def page(self) -> bytes:
        """The table's families as text 0.0.4: what other processes join to theirs."""
        return generate_latest(_Joined(self._collectors()))

    def answer(self, accept: str) -> tuple[bytes, str]:
        """The page of this process alone, `process_*` and `python_*` included, in the format that `accept` (an HTTP Accept
        header) asks for, and its content type."""
        joined = _Joined((*self._collectors(), self._process))
        if "application/openmetrics-text" not in accept:
            return generate_latest(joined), CONTENT_TYPE
        # the library's default for Prometheus escapes the colon of `vllm:…` away, in samples alone
        return openmetrics.generate_latest(joined, escaping=openmetrics.ALLOWUTF8), openmetrics.CONTENT_TYPE_LATEST

    def _collectors(self) -> tuple[Collector, ...]:
        return (self.registry, self._older) if self._older else (self.registry,)


class Rising:
    """A counter that follows a total counted elsewhere."""

    def __init__(self, inc: Callable[[float], None], total: Callable[[], int]) -> None:
        self._inc = inc
        self._total = total
        self._seen = 0

    def refresh(self) -> None:
        total = self._total()
        self._inc(total - self._seen)
        self._seen = total


class Tally:
    """A histogram's `observe` for what comes with every token: kept by one thread without locks, added at `refresh`."""

    def __init__(self, histogram: Histogram) -> None:
        self._bounds: list[float] = histogram._upper_bounds  # pyright: ignore[reportPrivateUsage]  # no other way to add many
        self._buckets = histogram._buckets  # pyright: ignore[reportPrivateUsage]
        self._whole = histogram._sum  # pyright: ignore[reportPrivateUsage]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, amount: float) -> None:
        self._counts[bisect_left(self._bounds, amount)] += 1  # a bound belongs to its bucket
        self._sum += amount

    def refresh(self) -> None:
        for bucket, count in zip(self._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._whole.inc(self._sum)
        self._counts, self._sum = [0] * len(self._bounds), 0.0


class _Joined(Collector):
    """Several collectors as one."""

    def __init__(self, collectors: tuple[Collector, ...]) -> None:
        self._collectors = collectors

    def collect(self) -> Iterator[Metric]:
        for collector in self._collectors:
            yield from collector.collect()
