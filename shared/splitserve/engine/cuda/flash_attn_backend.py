"""Attention by FlashAttention 2, where its paged KV takes our blocks: it wants blocks of a multiple of 256 tokens
(`--block-size 256`). Its `[blocks, tokens, heads, dim]` is our head-major view with two strides exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from splitserve.engine.attention.base import AttentionBackend, ForwardContext, LayerAttention
from splitserve.kv.storage import LayerView

_PAGE = 256  # tokens
_WIDEST = 256  # dims of a head


@dataclass(frozen=True, slots=True, eq=False)
class FlashAttnPlan:
    """A step's rows on the device; the lengths are int32 sums, as the kernel reads them."""

    block: torch.Tensor  # [T]
    offset: torch.Tensor  # [T]
    query_start: torch.Tensor  # [S + 1]
    key_start: torch.Tensor  # [S + 1]
    tables: torch.Tensor  # [S, M]
    longest_query: int
    longest_key: int


class FlashAttnBackend(AttentionBackend[FlashAttnPlan]):
    """`flash_attn` is the imported package."""

    name = "flash_attn"

    def __init__(self, flash_attn: Any, block_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self._attend = flash_attn.flash_attn_varlen_func
        self._block_tokens = block_tokens
        self._device = device
        self._dtype = dtype

    def supports(self, layer: LayerAttention) -> str | None:
        if self._block_tokens % _PAGE:
            return f"FlashAttention wants blocks of a multiple of {_PAGE} tokens, not {self._block_tokens}"
        if self._dtype not in (torch.bfloat16, torch.float16):
            return f"FlashAttention is for 16 bits, not {self._dtype}"
        if layer.k_dim != layer.v_dim or layer.k_dim % 8 or layer.k_dim > _WIDEST:
            return f"heads of {layer.k_dim} and {layer.v_dim} dims: FlashAttention takes equal ones to {_WIDEST}"
        if layer.heads % layer.kv_heads:
            return f"{layer.heads} query heads do not divide among {layer.kv_heads} KV heads"
        return "FlashAttention knows no sinks" if layer.sinks is not None else None

    def plan(self, context: ForwardContext) -> FlashAttnPlan:
        slots = self._tensor(context.slots[0])
        return FlashAttnPlan(
            slots // self._block_tokens,
            slots % self._block_tokens,
            self._tensor(context.query_start.astype(np.int32)),
            self._tensor(np.concatenate([[0], np.cumsum(context.kv_len)]).astype(np.int32)),
            self._tensor(context.block_tables[0].astype(np.int32)),
            int(np.diff(context.query_start).max()),
            int(context.kv_len.max()),
        )

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: FlashAttnPlan,
    ) -> torch.Tensor:
        if layer.source is None:
            view.k[plan.block, :, plan.offset] = key
            view.v[plan.block, :, plan.offset] = value
        return self._attend(
            query.contiguous(),
            view.k.transpose(1, 2),
            view.v.transpose(1, 2),
            plan.query_start,
            plan.key_start,
            plan.longest_query,
            plan.longest_key,
            softmax_scale=layer.scale,
            causal=True,
            window_size=(-1 if layer.window is None else layer.window - 1, -1),
            softcap=layer.softcap or 0.0,
            block_table=plan.tables,
        )

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
