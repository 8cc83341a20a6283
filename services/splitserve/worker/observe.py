"""A worker's metrics: what both roles count alike. Children are resolved once; a step costs a few additions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from splitserve.bus.bus import Bus
from splitserve.engine import door
from splitserve.telemetry.metrics import Metrics


class Loaded(Protocol):
    """What is read off a core when somebody asks."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def promised_blocks(self) -> int: ...


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


class WorkerMetrics:
    """Counters rise with each batch; gauges are read when the page is asked for. `more` refreshes a role's own."""

    def __init__(
        self, metrics: Metrics, core: Loaded, buses: Sequence[Bus], more: Callable[[], None] = lambda: None
    ) -> None:
        self._metrics = metrics
        self._core = core
        self._more = more
        self._running = metrics.gauge("vllm:num_requests_running")
        self._waiting = metrics.gauge("vllm:num_requests_waiting")
        self._usage = metrics.gauge("vllm:kv_cache_usage_perc")
        self._promised = metrics.gauge("splitserve_promised_blocks")
        self._queries = metrics.counter("vllm:prefix_cache_queries")
        self._hits = metrics.counter("vllm:prefix_cache_hits")
        self._preemptions = metrics.counter("vllm:num_preemptions")
        self._iteration = metrics.histogram("vllm:iteration_tokens_total")
        self._prefill_tokens = metrics.counter("splitserve_prefill_tokens")
        self._decode_tokens = metrics.counter("splitserve_decode_tokens")
        self._step = metrics.histogram("splitserve_step_seconds")
        self._rising = (
            Rising(metrics.counter("splitserve_bus_errors").inc, lambda: sum(b.counters.errors for b in buses)),
            Rising(metrics.counter("splitserve_bus_reconnects").inc, lambda: sum(b.counters.reconnects for b in buses)),
        )

    def on_batch(self, batch: door.Batch) -> None:
        pool, stats = batch.pool, batch.stats
        self._usage.set(1 - (pool.free + pool.cached) / pool.total if pool.total else 0.0)
        if stats is None:
            return
        self._queries.inc(stats.prefix_queries)
        self._hits.inc(stats.prefix_hits)
        self._preemptions.inc(stats.preemptions)
        self._prefill_tokens.inc(stats.prefill_tokens)
        self._decode_tokens.inc(stats.decode_tokens)
        self._iteration.observe(stats.prefill_tokens + stats.decode_tokens)
        self._step.observe(stats.seconds)

    def page(self) -> bytes:
        """The text exposition as of now."""
        self._running.set(self._core.running)
        self._waiting.set(self._core.waiting)
        self._promised.set(self._core.promised_blocks)
        for counter in self._rising:
            counter.refresh()
        self._more()
        return self._metrics.page()
