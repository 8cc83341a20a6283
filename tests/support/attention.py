"""Attention over paged KV held against the plain formula in float64, for ragged steps of any shape and any backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from splitserve.engine.attention.base import AttentionBackend, LayerAttention
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.batch import StepRow
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


def exact(layer: LayerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
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
        total = total + layer.sinks.cpu().double().exp()[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total, v)


def check(
    layer: LayerAttention,
    rows: list[Row],
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    *,
    backend: AttentionBackend[Any] | None = None,
    block: int = BLOCK,
    device: str = "cpu",
) -> None:
    """Run one step of `rows` and compare; blocks are dealt at random, and unused ones hold large numbers."""
    generator = torch.Generator().manual_seed(len(rows))
    lengths = [row.start + row.count for row in rows]
    needed = [-(-length // block) for length in lengths]
    name = str(dtype).removeprefix("torch.")
    layout = attention_layout(block, [LayerKV(0, layer.kv_heads, layer.k_dim, layer.v_dim, name)])
    storage = KvStorage(layout, sum(needed) + 3, device=device)
    view = storage.view(0)
    view.k.fill_(1e3)
    view.v.fill_(1e3)
    free = np.random.default_rng(0).permutation(storage.blocks).tolist()
    tables = [[free.pop() for _ in range(count)] for count in needed]
    keys = [torch.randn(n, layer.kv_heads, layer.k_dim, generator=generator).to(device, dtype) for n in lengths]
    values = [torch.randn(n, layer.kv_heads, layer.v_dim, generator=generator).to(device, dtype) for n in lengths]
    queries = [torch.randn(row.count, layer.heads, layer.k_dim, generator=generator).to(device, dtype) for row in rows]
    for row, table, key, value in zip(rows, tables, keys, values):
        for position in range(row.start):
            view.k[table[position // block], :, position % block] = key[position]
            view.v[table[position // block], :, position % block] = value[position]
    backend = backend or TorchBackend(block, device)
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
        backend.plan(forward_context(step, decodes, block)),
    )
    expected = [exact(layer, q.cpu(), k.cpu(), v.cpu(), row.start) for q, k, v, row in zip(queries, keys, values, rows)]
    torch.testing.assert_close(out.double().cpu(), torch.cat(expected), atol=tolerance, rtol=tolerance)
    for table, key, value, length in zip(tables, keys, values, lengths):
        stored = (
            view.k[table].transpose(1, 2).flatten(0, 1)[:length],
            view.v[table].transpose(1, 2).flatten(0, 1)[:length],
        )
        assert torch.equal(stored[0], key)
        assert torch.equal(stored[1], value)


RAGGED = [Row(0, 1), Row(13, 1), Row(40, 1), Row(3, 1), Row(0, 9), Row(5, 7), Row(8, 4), Row(30, 2)]
