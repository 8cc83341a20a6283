"""Attention over paged KV against the plain formula in float64, for ragged steps of any shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.engine.attention.base import LayerAttention
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.batch import StepRow
from splitserve.engine.context import attention_context, paged_attention
from splitserve.engine.forward import forward_context
from splitserve.kv.layout import LayerKV, attention_layout
from splitserve.kv.storage import KvStorage

BLOCK = 4
PLAIN = LayerAttention(layer=0, heads=4, kv_heads=2, k_dim=8, v_dim=8, scale=0.3)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
LAYERS = {
    "grouped": PLAIN,
    "one head for each query head": replace(PLAIN, kv_heads=4),
    "one KV head": replace(PLAIN, kv_heads=1),
    "window 1": replace(PLAIN, window=1),
    "window 5": replace(PLAIN, window=5),
    "window of a block": replace(PLAIN, window=BLOCK),
    "softcap": replace(PLAIN, softcap=1.5),
    "sinks": replace(PLAIN, sinks=SINKS),
    "sinks, softcap, window": replace(PLAIN, sinks=SINKS, softcap=1.5, window=6),
    "K wider than V": replace(PLAIN, k_dim=12, v_dim=8),
    "K wider than V, window, sinks": replace(PLAIN, k_dim=12, window=3, sinks=SINKS),
}


@dataclass(frozen=True)
class Row:
    """One sequence: `start` tokens are in the pool, `count` come in this step."""

    start: int
    count: int


def _exact(layer: LayerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """`q [n, Hq, Dk]` at positions from `start`, `k`, `v` `[L, H, D]` of the whole sequence."""
    k, v = (x.double().repeat_interleave(layer.group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    distance = torch.arange(start, start + len(q))[:, None] - torch.arange(len(k))
    hidden = (distance < 0) | (distance >= (layer.window or math.inf))
    weights = scores.masked_fill(hidden, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if layer.sinks is not None:
        total = total + layer.sinks.double().exp()[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total, v)


def _check(layer: LayerAttention, rows: list[Row], dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    """Run one step of `rows` and compare; blocks are dealt at random, and unused ones hold large numbers."""
    generator = torch.Generator().manual_seed(len(rows))
    lengths = [row.start + row.count for row in rows]
    needed = [-(-length // BLOCK) for length in lengths]
    name = str(dtype).removeprefix("torch.")
    layout = attention_layout(BLOCK, [LayerKV(0, layer.kv_heads, layer.k_dim, layer.v_dim, name)])
    storage = KvStorage(layout, sum(needed) + 3)
    view = storage.view(0)
    view.k.fill_(1e3)
    view.v.fill_(1e3)
    free = np.random.default_rng(0).permutation(storage.blocks).tolist()
    tables = [[free.pop() for _ in range(count)] for count in needed]
    keys = [torch.randn(n, layer.kv_heads, layer.k_dim, generator=generator).to(dtype) for n in lengths]
    values = [torch.randn(n, layer.kv_heads, layer.v_dim, generator=generator).to(dtype) for n in lengths]
    queries = [torch.randn(row.count, layer.heads, layer.k_dim, generator=generator).to(dtype) for row in rows]
    for row, table, key, value in zip(rows, tables, keys, values):
        for position in range(row.start):
            view.k[table[position // BLOCK], :, position % BLOCK] = key[position]
            view.v[table[position // BLOCK], :, position % BLOCK] = value[position]
    backend = TorchBackend(BLOCK)
    assert backend.supports(layer) is None
    decodes = next((i for i, row in enumerate(rows) if row.count > 1), len(rows))
    step = [StepRow([0] * row.count, row.start, [table]) for row, table in zip(rows, tables)]
    new = [slice(row.start, None) for row in rows]
    out = backend.forward(
        layer,
        torch.cat(queries),
        torch.cat([key[part] for key, part in zip(keys, new)]),
        torch.cat([value[part] for value, part in zip(values, new)]),
        view,
        backend.plan(forward_context(step, decodes, BLOCK)),
    )
    exact = [_exact(layer, q, k, v, row.start) for q, k, v, row in zip(queries, keys, values, rows)]
    torch.testing.assert_close(out.double(), torch.cat(exact), atol=tolerance, rtol=tolerance)
    for table, key, value, length in zip(tables, keys, values, lengths):
        stored = (
            view.k[table].transpose(1, 2).flatten(0, 1)[:length],
            view.v[table].transpose(1, 2).flatten(0, 1)[:length],
        )
        assert torch.equal(stored[0], key)
        assert torch.equal(stored[1], value)


RAGGED = [Row(0, 1), Row(13, 1), Row(40, 1), Row(3, 1), Row(0, 9), Row(5, 7), Row(8, 4), Row(30, 2)]


@pytest.mark.parametrize("name", LAYERS)
def test_a_ragged_step_of_decodes_and_chunks_is_exact(name: str) -> None:
    _check(LAYERS[name], RAGGED)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(LAYERS)),
    st.lists(st.integers(0, 50), max_size=9),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=4),
)
def test_any_mix_of_lengths_is_exact(name: str, decodes: list[int], chunks: list[tuple[int, int]]) -> None:
    rows = [Row(start, 1) for start in decodes] + [Row(start, count) for start, count in chunks]
    if rows:
        _check(LAYERS[name], rows)


@pytest.mark.parametrize("name", ["grouped", "softcap", "window 5"])
def test_bfloat16_is_as_near_as_its_rounding(name: str) -> None:
    _check(LAYERS[name], RAGGED, torch.bfloat16, 0.03)


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
    torch.testing.assert_close(out.double(), _exact(PLAIN, q, k, v, 5), atol=1e-5, rtol=1e-5)


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
