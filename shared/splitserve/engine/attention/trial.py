"""A fast backend has to show that it is right on this machine before it serves: against the reference, in float32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from splitserve.engine.attention.base import AttentionBackend, LayerAttention
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.batch import StepRow
from splitserve.engine.forward import forward_context
from splitserve.kv.layout import LayerKV, attention_layout
from splitserve.kv.storage import KvStorage

BOUND = 0.01  # of 1 + |the exact value|: rounding to bfloat16 alone gives up to 0.004
# (tokens in the pool, tokens of this step); 3 decodes, one of them longer than a tile of keys
_ROWS = ((0, 1), (13, 1), (1100, 1), (0, 40), (5, 7), (130, 150))
_DECODES = 3


@torch.inference_mode()
def refuse_wrong(
    backend: AttentionBackend[Any],
    layers: Iterable[LayerAttention],
    block_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> str | None:
    """None where `backend` serves all `layers` within `BOUND`, else one clause saying which it does not."""
    distinct = {(x.heads, x.kv_heads, x.k_dim, x.v_dim, x.scale, x.window, x.softcap): x for x in layers}
    for layer in distinct.values():
        refusal = backend.supports(layer)
        if refusal is not None:
            return refusal
        exact = _step(TorchBackend(block_tokens), _on_host(layer), block_tokens, dtype, torch.float32, "cpu")
        got = _step(backend, layer, block_tokens, dtype, dtype, device)
        error = float(((got - exact).abs() / (1 + exact.abs())).max())
        if not error <= BOUND:  # a NaN must not pass
            return f"a layer of {layer.heads} heads is off by {error:.2g}, the bound is {BOUND:g}"
    return None


def _step(
    backend: AttentionBackend[Any],
    layer: LayerAttention,
    block_tokens: int,
    drawn: torch.dtype,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """One ragged step over numbers drawn in `drawn`, computed in `dtype` on `device`: `[T, Hq, Dv]` in float32."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(tokens, heads, dim, generator=generator).to(drawn).to(device, dtype)

    lengths = [start + count for start, count in _ROWS]
    needed = [-(-length // block_tokens) for length in lengths]
    name = str(dtype).removeprefix("torch.")
    storage = KvStorage(
        attention_layout(block_tokens, [LayerKV(0, layer.kv_heads, layer.k_dim, layer.v_dim, name)]),
        sum(needed),
        device=device,
    )
    view = storage.view(0)
    dealt = np.random.default_rng(0).permutation(storage.blocks).tolist()
    tables = [[dealt.pop() for _ in range(count)] for count in needed]
    keys = [draw(length, layer.kv_heads, layer.k_dim) for length in lengths]
    values = [draw(length, layer.kv_heads, layer.v_dim) for length in lengths]
    query = torch.cat([draw(count, layer.heads, layer.k_dim) for _, count in _ROWS])
    for (start, _), table, key, value in zip(_ROWS, tables, keys, values):
        position = torch.arange(start, device=device)
        block = torch.tensor(table, device=device)[position // block_tokens]
        view.k[block, :, position % block_tokens] = key[:start]
        view.v[block, :, position % block_tokens] = value[:start]
    rows = [StepRow([0] * count, start, [table]) for (start, count), table in zip(_ROWS, tables)]
    plan = backend.plan(forward_context(rows, _DECODES, block_tokens))
    new_keys = torch.cat([key[start:] for (start, _), key in zip(_ROWS, keys)])
    new_values = torch.cat([value[start:] for (start, _), value in zip(_ROWS, values)])
    return backend.forward(layer, query, new_keys, new_values, view, plan).float().cpu()


def _on_host(layer: LayerAttention) -> LayerAttention:
    return layer if layer.sinks is None else replace(layer, sinks=layer.sinks.cpu())
