"""Attention over paged KV by the C++ kernels of `native/`: bfloat16 on CPUs with AVX512_BF16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from splitserve.engine.attention.base import AttentionBackend, ForwardContext, LayerAttention
from splitserve.engine.native.library import amx_allowed
from splitserve.kv.storage import LayerView

_LANES = 16  # tokens that a kernel scores at once
_PAIRS = 32  # elements that one instruction multiplies
_WIDEST = 256  # dims of a head


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A step's rows as the kernels read them; all int64."""

    query_start: torch.Tensor  # [S + 1]
    kv_len: torch.Tensor  # [S]
    table: torch.Tensor  # [S, M]
    slots: torch.Tensor  # [T]
    num_decodes: int
    keep: torch.Tensor | None = None  # tokens whose output is wanted, each the last of its row; None: all


def native_plan(context: ForwardContext, keep: Sequence[int] | None = None) -> NativePlan:
    """`context` as tensors."""
    return NativePlan(
        _int64(context.query_start),
        _int64(context.kv_len),
        _int64(context.block_tables[0]),
        _int64(context.slots[0]),
        context.num_decodes,
        None if keep is None else _int64(np.array(keep, dtype=np.int64)),
    )


class NativeBackend(AttentionBackend[NativePlan]):
    """See the module. `native.library.load` must have succeeded."""

    name = "native"

    def __init__(self, block_tokens: int, dtype: torch.dtype) -> None:
        self._block_tokens = block_tokens
        self._dtype = dtype

    @cached_property
    def _amx(self) -> bool:
        return amx_allowed()

    def supports(self, layer: LayerAttention) -> str | None:
        if self._dtype != torch.bfloat16:
            return f"the kernels are for bfloat16, not {self._dtype}"
        if self._block_tokens % _LANES:
            return f"blocks of {self._block_tokens} tokens are no multiple of {_LANES}"
        if layer.k_dim % _PAIRS or layer.v_dim % _PAIRS or max(layer.k_dim, layer.v_dim) > _WIDEST:
            return f"heads of {layer.k_dim} and {layer.v_dim} dims: multiples of {_PAIRS} to {_WIDEST} are served"
        if layer.heads % layer.kv_heads:
            return f"{layer.heads} query heads do not divide among {layer.kv_heads} KV heads"
        if layer.softcap is not None or layer.sinks is not None:
            return "the kernels know no softcap and no sinks"
        return None

    def plan(self, context: ForwardContext) -> NativePlan:
        return native_plan(context)

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: NativePlan,
    ) -> torch.Tensor:
        return torch.ops.splitserve.paged_attention(
            query,
            key,
            value,
            view.k,
            view.v,
            plan.query_start,
            plan.kv_len,
            plan.table,
            plan.slots,
            plan.num_decodes,
            layer.scale,
            layer.window or 0,
            layer.source is None,
            self._amx,
        )


def _int64(array: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
