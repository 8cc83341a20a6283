from __future__ import annotations

from collections import Counter

from splitserve.engine import door
from splitserve.protocol.states import RefuseReason, Role
from splitserve.telemetry.metrics import Metrics
from splitserve.worker.estimates import Estimator, LayerSizes, ModelSizes
from splitserve.worker.observe import StepMetrics, WorkerMetrics

POOL = door.PoolStats(total=10, free=4, filling=1, owned=3, cached=2)
STATS = door.StepStats(
    seconds=0.02, prefill_tokens=5, decode_tokens=3, replayed_tokens=2, samples=4, attended=60, context=30,
    running=3, waiting=1, awaiting=0, prefix_queries=5, prefix_hits=2, preemptions=0,
)  # fmt: skip
PROBE = door.StepStats(0.02, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0)
SIZES = ModelSizes(hidden=8, feed_forward=16, vocabulary=100, layers=(LayerSizes(8, 8),), item_bytes=2)


class Core:
    promised_blocks = 7

    def __init__(self) -> None:
        self.refused = Counter[RefuseReason]()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model_name": "m", "engine": "d-0", **labels})


def made() -> Metrics:
    return Metrics(Role.DECODE, model_name="m", engine="d-0", max_model_len=256)


def test_a_step_moves_what_it_did() -> None:
    metrics = made()
    StepMetrics(metrics, Estimator(SIZES)).on_batch(door.Batch((), STATS, POOL, 0))
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 8
    assert value(metrics, "splitserve_prefill_tokens_total") == 5
    assert value(metrics, "splitserve_decode_tokens_total") == 3
    assert value(metrics, "splitserve_replayed_tokens_total") == 2
    assert value(metrics, "vllm:prefix_cache_hits_total") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.4
    assert (value(metrics, "vllm:estimated_flops_per_gpu_total") or 0) > 0


def test_a_step_that_only_answered_a_probe_moves_no_counter() -> None:
    metrics = made()
    StepMetrics(metrics, Estimator(SIZES)).on_batch(door.Batch((), PROBE, POOL, 0))
    assert value(metrics, "vllm:iteration_tokens_total_count") == 0
    assert value(metrics, "splitserve_step_seconds_count") == 0
    assert value(metrics, "vllm:estimated_flops_per_gpu_total") == 0


def test_gauges_are_read_when_the_page_is_asked_for_and_refusals_rise() -> None:
    metrics, core, age_ms = made(), Core(), [0]
    observed = WorkerMetrics(metrics, core, lambda: (3, 2), (), lambda: age_ms[0])
    observed.page()
    core.refused[RefuseReason.FULL] += 2
    age_ms[0] = 1500
    page = observed.page().decode()
    assert 'vllm:num_requests_waiting_by_reason{engine="d-0",model_name="m",reason="capacity"} 2.0' in page
    assert 'splitserve_jobs_refused_total{engine="d-0",model_name="m",reason="full"} 2.0' in page
    assert 'splitserve_step_age_seconds{engine="d-0",model_name="m"} 1.5' in page
