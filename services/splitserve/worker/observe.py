"""A worker's metrics: what both roles count alike. Children are resolved once; a step costs a few additions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from splitserve.bus.bus import Bus
from splitserve.engine import door
from splitserve.protocol.states import RefuseReason
from splitserve.telemetry.metrics import Metrics, Rising
from splitserve.worker.estimates import Estimator


class Loaded(Protocol):
    """What is read off a core when somebody asks."""

    @property
    def promised_blocks(self) -> int: ...
    @property
    def refused(self) -> Mapping[RefuseReason, int]: ...


class StepMetrics:
    """What each step adds. A step that only answered a readiness probe adds nothing."""

    def __init__(self, metrics: Metrics, estimator: Estimator) -> None:
        self._estimator = estimator
        self._usage = metrics.gauge("vllm:kv_cache_usage_perc")
        self._queries = metrics.counter("vllm:prefix_cache_queries")
        self._hits = metrics.counter("vllm:prefix_cache_hits")
        self._preemptions = metrics.counter("vllm:num_preemptions")
        self._iteration = metrics.histogram("vllm:iteration_tokens_total")
        self._operations = metrics.counter("vllm:estimated_flops_per_gpu")
        self._read = metrics.counter("vllm:estimated_read_bytes_per_gpu")
        self._written = metrics.counter("vllm:estimated_write_bytes_per_gpu")
        self._prefill_tokens = metrics.counter("splitserve_prefill_tokens")
        self._replayed_tokens = metrics.counter("splitserve_replayed_tokens")
        self._decode_tokens = metrics.counter("splitserve_decode_tokens")
        self._step = metrics.histogram("splitserve_step_seconds")

    def on_batch(self, batch: door.Batch) -> None:
        pool, stats = batch.pool, batch.stats
        self._usage.set(1 - (pool.free + pool.cached) / pool.total if pool.total else 0.0)
        if stats is None:
            return
        self._preemptions.inc(stats.preemptions)
        tokens = stats.prefill_tokens + stats.decode_tokens
        if not tokens + stats.replayed_tokens:
            return
        self._replayed_tokens.inc(stats.replayed_tokens)
        self._queries.inc(stats.prefix_queries)
        self._hits.inc(stats.prefix_hits)
        self._prefill_tokens.inc(stats.prefill_tokens)
        self._decode_tokens.inc(stats.decode_tokens)
        self._iteration.observe(tokens)
        self._step.observe(stats.seconds)
        work = self._estimator.of(stats)
        self._operations.inc(work.operations)
        self._read.inc(work.read_bytes)
        self._written.inc(work.written_bytes)


class WorkerMetrics:
    """The page: gauges are read when it is asked for. `more` refreshes a role's own.

    `load` is (running, waiting) off the engine, in the midst of its steps: a core hears of a step when it has ended.
    """

    def __init__(
        self,
        metrics: Metrics,
        core: Loaded,
        load: Callable[[], tuple[int, int]],
        buses: Sequence[Bus],
        step_age_ms: Callable[[], int],
        more: Callable[[], None] = lambda: None,
    ) -> None:
        self._metrics = metrics
        self._more = more
        self._gauges: tuple[tuple[Callable[[float], None], Callable[[], float]], ...] = (
            (metrics.gauge("vllm:num_requests_running").set, lambda: load()[0]),
            (metrics.gauge("vllm:num_requests_waiting").set, lambda: load()[1]),
            (metrics.gauge("vllm:num_requests_waiting_by_reason", reason="capacity").set, lambda: load()[1]),
            (metrics.gauge("splitserve_promised_blocks").set, lambda: core.promised_blocks),
            (metrics.gauge("splitserve_step_age_seconds").set, lambda: step_age_ms() / 1000),
        )
        self._rising = (
            Rising(metrics.counter("splitserve_bus_errors").inc, lambda: sum(b.counters.errors for b in buses)),
            Rising(metrics.counter("splitserve_bus_reconnects").inc, lambda: sum(b.counters.reconnects for b in buses)),
            *(_refusals(metrics, core, reason) for reason in RefuseReason),
        )

    def page(self) -> bytes:
        """The table's families as of now, for who joins pages."""
        self._refresh()
        return self._metrics.page()

    def answer(self, accept: str) -> tuple[bytes, str]:
        """This process's own page as of now, in the format that an Accept header asks for, and its content type."""
        self._refresh()
        return self._metrics.answer(accept)

    def _refresh(self) -> None:
        for put, read in self._gauges:
            put(read())
        for counter in self._rising:
            counter.refresh()
        self._more()


def _refusals(metrics: Metrics, core: Loaded, reason: RefuseReason) -> Rising:
    counter = metrics.counter("splitserve_jobs_refused", reason=reason)
    return Rising(counter.inc, lambda: core.refused.get(reason, 0))
