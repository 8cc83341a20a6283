"""Older names of vLLM's series, for dashboards that still ask for them (`--legacy-metrics`).

Each is one of today's families under its old name, with the labels of old: the model's name alone. Within one process
there is one engine, so no two series meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

ZERO = ""


@dataclass(frozen=True, slots=True)
class Legacy:
    """`of`: today's name; empty for a gauge that is 0 for ever."""

    name: str
    of: str
    why: str = ""


LEGACY = (
    Legacy("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc"),
    Legacy("vllm:gpu_prefix_cache_queries", "vllm:prefix_cache_queries"),
    Legacy("vllm:gpu_prefix_cache_hits", "vllm:prefix_cache_hits"),
    Legacy("vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"),
    Legacy("vllm:num_requests_swapped", ZERO, "nothing is swapped to host memory"),
    Legacy("vllm:cpu_cache_usage_perc", ZERO, "no KV is kept in host memory"),
)


class LegacyCollector(Collector):
    """Collects the older names out of `registry`. A family that this process does not own gives nothing."""

    def __init__(self, registry: CollectorRegistry, model_name: str, *, zeros: bool) -> None:
        self._registry = registry
        self._labels = {"model_name": model_name}
        self._zeros = zeros
        self._names = {legacy.of: legacy.name for legacy in LEGACY if legacy.of}

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            name = self._names.get(metric.name)
            if name is not None:
                yield self._renamed(metric, name)
        for legacy in LEGACY if self._zeros else ():
            if legacy.of == ZERO:
                zero = Metric(legacy.name, f"0: {legacy.why}.", "gauge")
                zero.add_sample(legacy.name, self._labels, 0.0)
                yield zero

    def _renamed(self, metric: Metric, name: str) -> Metric:
        old = Metric(name, f"{metric.documentation} Older name of {metric.name}.", metric.type)
        for sample in metric.samples:
            bound = {"le": sample.labels["le"]} if "le" in sample.labels else {}
            old.add_sample(name + sample.name.removeprefix(metric.name), {**self._labels, **bound}, sample.value)
        return old
