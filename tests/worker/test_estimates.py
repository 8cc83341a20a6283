"""The estimate against sums made by hand, layer by layer, for a model of two small layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitserve.engine.door import StepStats
from splitserve.worker.estimates import Estimator, LayerSizes, ModelSizes, Work

D, F, V, Q, KV = 8, 16, 100, 8, 4
SIZES = ModelSizes(hidden=D, feed_forward=F, vocabulary=V, layers=(LayerSizes(Q, KV),) * 2, item_bytes=2)
WEIGHTS = 2 * (D * (Q + KV) + Q * D + 3 * D * F)
NOTHING = StepStats(0.1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_a_step_of_a_probe_is_no_work() -> None:
    assert Estimator(SIZES).of(NOTHING) == Work(0, 0, 0)


def test_a_chunk_without_a_sample_does_not_touch_the_output_layer() -> None:
    work = Estimator(SIZES).of(replace(NOTHING, prefill_tokens=4, attended=16))
    assert work.operations == 2 * 4 * WEIGHTS + 2 * (4 * 16 * Q)
    activations = 2 * (D + Q + Q + D + 2 * F + F)
    assert work.read_bytes == 2 * (WEIGHTS + 4 * activations + 4 * 2 * KV)
    assert work.written_bytes == 2 * 4 * 2 * ((Q + KV) + KV + D + 2 * F + F + D)


def test_a_decode_step_reads_the_kv_of_its_context_and_the_output_layer() -> None:
    stats = replace(NOTHING, decode_tokens=2, samples=2, attended=30, context=30)
    work = Estimator(SIZES).of(stats)
    assert work.operations == 2 * 2 * WEIGHTS + 2 * (4 * 30 * Q) + 2 * 2 * D * V
    activations = 2 * (D + Q + Q + D + 2 * F + F)
    assert work.read_bytes == 2 * (WEIGHTS + 2 * activations + 30 * 2 * KV + D * V + 2 * D)


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_bytes_follow_the_dtype_and_operations_do_not(item_bytes: int) -> None:
    stats = replace(NOTHING, decode_tokens=1, samples=1, attended=5, context=5)
    one, other = Estimator(replace(SIZES, item_bytes=1)).of(stats), Estimator(replace(SIZES, item_bytes=item_bytes)).of(stats)  # fmt: skip
    assert other.operations == one.operations
    assert other.read_bytes == item_bytes * one.read_bytes
    assert other.written_bytes == item_bytes * one.written_bytes
