"""Attention over paged KV against the plain formula in float64, for ragged steps of any shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.batch import StepRow
from splitserve.engine.context import attention_context, paged_attention
from splitserve.engine.forward import forward_context
from splitserve.kv.layout import LayerKV, attention_layout
from splitserve.kv.storage import KvStorage
from support.attention import BLOCK, LAYERS, PLAIN, RAGGED, Row, check, exact


@pytest.mark.parametrize("name", LAYERS)
def test_a_ragged_step_of_decodes_and_chunks_is_exact(name: str) -> None:
    check(LAYERS[name], RAGGED)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(LAYERS)),
    st.lists(st.integers(0, 50), max_size=9),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=4),
)
def test_any_mix_of_lengths_is_exact(name: str, decodes: list[int], chunks: list[tuple[int, int]]) -> None:
    rows = [Row(start, 1) for start in decodes] + [Row(start, count) for start, count in chunks]
    if rows:
        check(LAYERS[name], rows)


@pytest.mark.parametrize("name", ["grouped", "softcap", "window 5"])
def test_bfloat16_is_as_near_as_its_rounding(name: str) -> None:
    check(LAYERS[name], RAGGED, torch.bfloat16, 0.03)


def test_decodes_of_very_different_lengths_do_not_pad_each_other() -> None:
    lengths = np.array([4 * BLOCK] * 8 + [100 * BLOCK] * 8 + [1])
    rows = [StepRow([0], int(length) - 1, [list(range(-(-int(length) // BLOCK)))]) for length in lengths]
    backend = TorchBackend(BLOCK)
    windowed = backend.step_for(backend.plan(forward_context(rows, len(rows), BLOCK)), None)
    gathered = sum(decodes.gather.tables.numel() for decodes in windowed.decodes)
    assert gathered <= 1.3 * (8 * 4 + 8 * 100 + 1)
    assert len(windowed.decodes) <= 3


def test_a_window_gathers_only_the_blocks_that_it_can_see() -> None:
    rows = [StepRow([0], 400, [list(range(101))]), StepRow([0] * 6, 200, [list(range(52))])]
    backend = TorchBackend(BLOCK)
    windowed = backend.step_for(backend.plan(forward_context(rows, 1, BLOCK)), 8)
    assert windowed.decodes[0].gather.tables.shape[1] <= 3
    (chunk,) = windowed.chunks
    assert chunk.gather is not None
    assert chunk.gather.tables.shape[1] <= 4


def test_heads_that_do_not_divide_are_refused() -> None:
    refusal = TorchBackend(BLOCK).supports(replace(PLAIN, heads=5))
    assert refusal == "5 query heads do not divide among 2 KV heads"


def test_a_layer_that_shares_kv_reads_its_source_and_writes_nothing() -> None:
    layout = attention_layout(BLOCK, [LayerKV(0, 2, 8, 8, "float32")])
    storage = KvStorage(layout, 2)
    view = storage.view(0)
    view.k.normal_()
    view.v.normal_()
    before = storage.bytes.clone()
    backend = TorchBackend(BLOCK)
    q = torch.randn(1, 4, 8)
    plan = backend.plan(forward_context([StepRow([0], 5, [[1, 0]])], 1, BLOCK))
    out = backend.forward(replace(PLAIN, layer=3, source=0), q, torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), view, plan)
    assert torch.equal(storage.bytes, before)
    k, v = (part[[1, 0]].transpose(1, 2).flatten(0, 1)[:6] for part in (view.k, view.v))
    torch.testing.assert_close(out.double(), exact(PLAIN, q, k, v, 5), atol=1e-5, rtol=1e-5)


def test_attention_outside_of_a_step_is_an_error() -> None:
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(RuntimeError, match="outside of a step"):
        paged_attention(torch.nn.Identity(), q, q, q)


def test_the_context_ends_with_its_step_even_when_that_fails() -> None:
    class Raises:
        def attend(self, *_: Any, **__: Any) -> torch.Tensor:
            raise ValueError("in the step")

    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="in the step"), attention_context(Raises()):
        paged_attention(torch.nn.Identity(), q, q, q)
    with pytest.raises(RuntimeError, match="outside of a step"):
        paged_attention(torch.nn.Identity(), q, q, q)
