"""Attention over paged KV in plain torch, on any device: the reference, and what serves where no kernel does.

Decodes of a step are gathered in a few groups of like length and answered by one call each; the query heads that share a
KV head are folded into the query length. Chunks go one by one: a prompt's first chunk needs no gather at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from splitserve.engine.attention.base import AttentionBackend, ForwardContext, LayerAttention
from splitserve.kv.storage import LayerView

_PADDING = 1.25  # decodes share a gather while it stays within this much of what they need
_GATHER_BLOCKS = 4096  # and within this many blocks, which bounds its memory


@dataclass(slots=True)
class Gather:
    """Blocks of some rows, `tables [S, M]`; the row indices that different layer shapes need are made on demand."""

    tables: torch.Tensor
    rows: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict[tuple[int, int], torch.Tensor])

    def load(self, view: LayerView, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`k [H, S, M * B, Dk]` and `v [H, S, M * B, Dv]`, copied out of the pool."""
        s, m = self.tables.shape
        if view.rows is None:
            k, v = view.k.transpose(0, 1)[:, self.tables], view.v.transpose(0, 1)[:, self.tables]
            return k.reshape(heads, s, -1, k.shape[-1]), v.reshape(heads, s, -1, v.shape[-1])
        key = (heads, view.rows_per_block)
        if key not in self.rows:
            runs = torch.arange(2 * heads, device=self.tables.device)
            self.rows[key] = (runs[:, None] + (self.tables * view.rows_per_block).view(1, -1)).view(-1)
        both = view.rows.index_select(0, self.rows[key]).view(2, heads, s, m * view.k.shape[2], view.k.shape[3])
        return both[0], both[1]


@dataclass(frozen=True, slots=True)
class Decodes:
    """Decodes answered together: token `index` of the step each, over `gather`, where `mask [1, S, 1, L]` is true."""

    index: torch.Tensor | slice
    gather: Gather
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, stop) of the step, one sequence's. `gather` and `mask [n, L]` are None for a prompt's first chunk,
    which sees only itself."""

    start: int
    stop: int
    gather: Gather | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class WindowedStep:
    """The step as layers of one window see it."""

    decodes: tuple[Decodes, ...]
    chunks: tuple[Chunk, ...]


@dataclass(slots=True)
class TorchPlan:
    """A step's slots, and its gathers for each window that the model has."""

    context: ForwardContext
    block: torch.Tensor  # [T]
    offset: torch.Tensor  # [T]
    windows: dict[int | None, WindowedStep] = field(default_factory=dict[int | None, WindowedStep])


class TorchBackend(AttentionBackend[TorchPlan]):
    """See the module. `block_tokens` is the layout's."""

    name = "torch"

    def __init__(self, block_tokens: int, device: torch.device | str = "cpu") -> None:
        self._block_tokens = block_tokens
        self._device = torch.device(device)

    def supports(self, layer: LayerAttention) -> str | None:
        if layer.heads % layer.kv_heads:
            return f"{layer.heads} query heads do not divide among {layer.kv_heads} KV heads"
        return None

    def plan(self, context: ForwardContext) -> TorchPlan:
        slots = self._tensor(context.slots[0])
        return TorchPlan(context, slots // self._block_tokens, slots % self._block_tokens)

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: TorchPlan,
    ) -> torch.Tensor:
        if layer.source is None:
            view.k[plan.block, :, plan.offset] = key
            view.v[plan.block, :, plan.offset] = value
        windowed = self.step_for(plan, layer.window)
        if len(windowed.decodes) == 1 and not windowed.chunks:
            (decodes,) = windowed.decodes
            if isinstance(decodes.index, slice):  # all tokens of the step
                return _decode(layer, query, *decodes.gather.load(view, layer.kv_heads), decodes)
        out = query.new_empty(query.shape[0], layer.heads, layer.v_dim)
        for decodes in windowed.decodes:
            out[decodes.index] = _decode(
                layer, query[decodes.index], *decodes.gather.load(view, layer.kv_heads), decodes
            )
        for chunk in windowed.chunks:
            rows = slice(chunk.start, chunk.stop)
            if chunk.gather is None:
                k, v = key[rows].transpose(0, 1).unsqueeze(1), value[rows].transpose(0, 1).unsqueeze(1)
            else:
                k, v = chunk.gather.load(view, layer.kv_heads)
            out[rows] = _chunk(layer, query[rows], k, v, chunk.mask)
        return out

    def step_for(self, plan: TorchPlan, window: int | None) -> WindowedStep:
        """What layers with this window gather; made once a step."""
        if window not in plan.windows:
            context = plan.context
            plan.windows[window] = WindowedStep(
                tuple(self._decodes(context, window)), tuple(self._chunks(context, window))
            )
        return plan.windows[window]

    def _decodes(self, context: ForwardContext, window: int | None) -> Iterator[Decodes]:
        count = context.num_decodes
        if not count:
            return
        length = context.kv_len[:count]
        first = _first_block(length - 1, window, self._block_tokens)
        blocks = -(-length // self._block_tokens) - first
        order = np.argsort(blocks, kind="stable")
        for group in _groups(blocks[order]):
            rows = order[group]
            width = int(blocks[rows[-1]])
            columns = first[rows, None] + np.arange(width)
            tables = context.block_tables[0][rows[:, None], np.minimum(columns, context.block_tables[0].shape[1] - 1)]
            position = first[rows, None] * self._block_tokens + np.arange(width * self._block_tokens)
            seen = position < length[rows, None]
            if window is not None:
                seen &= position >= length[rows, None] - window
            index = (
                slice(0, count) if len(rows) == count and np.array_equal(rows, np.arange(count)) else self._tensor(rows)
            )
            yield Decodes(index, Gather(self._tensor(tables)), self._tensor(seen)[None, :, None])

    def _chunks(self, context: ForwardContext, window: int | None) -> Iterator[Chunk]:
        for row in range(context.num_decodes, len(context.kv_len)):
            begin, end = int(context.query_start[row]), int(context.query_start[row + 1])
            length = int(context.kv_len[row])
            start = length - (end - begin)
            if start == 0 and (window is None or window >= length):
                yield Chunk(begin, end, None, None)
                continue
            first = int(_first_block(np.array(start), window, self._block_tokens))
            last = -(-length // self._block_tokens)
            query = torch.arange(start, length, device=self._device)[:, None]
            position = torch.arange(first * self._block_tokens, last * self._block_tokens, device=self._device)
            seen = position <= query
            if window is not None:
                seen &= position > query - window
            gather = Gather(self._tensor(context.block_tables[0][row : row + 1, first:last]))
            yield Chunk(begin, end, gather, seen)

    def _tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


def _first_block(position: NDArray[np.int64], window: int | None, block_tokens: int) -> NDArray[np.int64]:
    """The first block that a query at `position` can see."""
    if window is None:
        return np.zeros_like(position)
    return np.maximum(position - window + 1, 0) // block_tokens


def _groups(blocks: NDArray[np.int64]) -> Iterator[slice]:
    """Split ascending block counts so that padding each group to its longest wastes little and no gather is huge."""
    start, used = 0, 0
    for stop, count in enumerate(blocks.tolist()):
        rows = stop - start + 1
        if rows > 1 and (rows * count > _PADDING * (used + count) + rows or rows * count > _GATHER_BLOCKS):
            yield slice(start, stop)
            start, used = stop, 0
        used += count
    yield slice(start, len(blocks))


def _decode(
    layer: LayerAttention, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decodes: Decodes
) -> torch.Tensor:
    """`query [S, Hq, Dk]`, `k [H, S, L, Dk]` -> `[S, Hq, Dv]`: batch of KV heads, heads of sequences, length of group."""
    rows = query.shape[0]
    folded = query.view(rows, layer.kv_heads, layer.group, layer.k_dim).transpose(0, 1)
    sinks = None if layer.sinks is None else layer.sinks.view(layer.kv_heads, 1, layer.group, 1)
    out = _attend(layer, folded, k, v, decodes.mask, sinks)
    return out.transpose(0, 1).reshape(rows, layer.heads, layer.v_dim)


def _chunk(
    layer: LayerAttention, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`query [n, Hq, Dk]`, `k [H, 1, L, Dk]` -> `[n, Hq, Dv]`."""
    heads_first = query.transpose(0, 1).unsqueeze(0)
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    if layer.softcap is None and layer.sinks is None:
        if mask is not None and query.is_cuda:  # there the kernel that takes a mask knows no groups of heads
            k, v = (part.repeat_interleave(layer.group, 1) for part in (k, v))
        out = functional.scaled_dot_product_attention(
            heads_first, k, v, mask, is_causal=mask is None, scale=layer.scale, enable_gqa=k.shape[1] != layer.heads
        )
        return out[0].transpose(0, 1)
    n = query.shape[0]
    if mask is None:
        mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
    folded = heads_first.view(1, layer.kv_heads, layer.group, n, layer.k_dim)
    sinks = None if layer.sinks is None else layer.sinks.view(1, layer.kv_heads, layer.group, 1, 1)
    out = _attend(layer, folded, k.unsqueeze(2), v.unsqueeze(2), mask, sinks)
    return out.view(layer.heads, n, layer.v_dim).transpose(0, 1)


def _attend(
    layer: LayerAttention,
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with leading dims broadcast. With a softcap or sinks by hand, as SDPA knows neither."""
    if layer.softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(query, k, v, mask, scale=layer.scale)
    scores = torch.matmul(query, k.transpose(-1, -2)).float() * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        sink = sinks.float().expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    return torch.matmul(weights.to(v.dtype), v)
