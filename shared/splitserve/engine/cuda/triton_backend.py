"""Decode attention by the kernels of `triton_kernels.py`, on any GPU that Triton knows. Takes decodes only."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from splitserve.engine.attention.base import ForwardContext, LayerAttention
from splitserve.engine.cuda.static import CapturableBackend, StepTensors
from splitserve.kv.storage import LayerView

_WIDEST = 256  # dims of a head
_TILE = 64  # keys at a time
_LEAST = 16  # rows of a matrix product
_MOST_PARTS = 16
_PROGRAMS_PER_UNIT = 2  # of the kernel, that a multiprocessor should have to do


@dataclass(frozen=True, slots=True, eq=False)
class TritonPlan:
    """A decode step on the device; `block` and `offset` say where its KV goes."""

    block: torch.Tensor  # [S]
    offset: torch.Tensor  # [S]
    kv_len: torch.Tensor  # [S]
    tables: torch.Tensor  # [S, M]


class TritonBackend(CapturableBackend[TritonPlan]):
    """`units`: multiprocessors of the device, which the keys of a small batch are split among."""

    name = "triton"

    def __init__(self, block_tokens: int, device: torch.device, units: int) -> None:
        self._block_tokens = block_tokens
        self._device = device
        self._units = units
        self._kernels: Any = importlib.import_module("splitserve.engine.cuda.triton_kernels")

    def supports(self, layer: LayerAttention) -> str | None:
        if layer.heads % layer.kv_heads:
            return f"{layer.heads} query heads do not divide among {layer.kv_heads} KV heads"
        if max(layer.k_dim, layer.v_dim) > _WIDEST:
            return f"heads of {layer.k_dim} and {layer.v_dim} dims: up to {_WIDEST} are served"
        return None

    def plan(self, context: ForwardContext) -> TritonPlan:
        if context.num_decodes != len(context.kv_len):
            raise ValueError(f"{len(context.kv_len) - context.num_decodes} chunks among the decodes")
        slots, kv_len, tables = (
            self._tensor(array) for array in (context.slots[0], context.kv_len, context.block_tables[0])
        )
        return self._plan(slots, kv_len, tables)

    def static(self, tensors: StepTensors, layers: Iterable[LayerAttention]) -> _Static:
        return _Static(self, tensors)

    def plan_of(self, tensors: StepTensors) -> TritonPlan:
        return self._plan(tensors.slots, tensors.kv_len, tensors.tables)

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: TritonPlan,
    ) -> torch.Tensor:
        if layer.source is None:
            view.k[plan.block, :, plan.offset] = key
            view.v[plan.block, :, plan.offset] = value
        rows, heads = query.shape[0], layer.heads
        query = query.contiguous()
        parts = self._parts(rows * layer.kv_heads)
        partial = query.new_empty((rows, heads, parts, layer.v_dim), dtype=torch.float32)
        log_sum = query.new_empty((rows, heads, parts), dtype=torch.float32)
        out = query.new_empty((rows, heads, layer.v_dim))
        self._kernels.attend_part[(rows, layer.kv_heads, parts)](
            query, view.k, view.v, plan.tables, plan.kv_len, partial, log_sum, layer.scale,
            query.stride(0), query.stride(1), *view.k.stride()[:3], *view.v.stride()[:3], plan.tables.stride(0),
            GROUP=layer.group, GROUP_PADDED=max(_LEAST, _power(layer.group)),
            K_DIM=layer.k_dim, K_PADDED=max(_LEAST, _power(layer.k_dim)),
            V_DIM=layer.v_dim, V_PADDED=max(_LEAST, _power(layer.v_dim)),
            BLOCK=self._block_tokens, TILE=_TILE, PARTS=parts,
            WINDOW=layer.window or 0, SOFTCAP=layer.softcap or 0.0, num_stages=2,
        )  # fmt: skip
        self._kernels.join_parts[(rows, heads)](
            partial, log_sum, log_sum if layer.sinks is None else layer.sinks, out,
            V_DIM=layer.v_dim, V_PADDED=_power(layer.v_dim), PARTS=parts, HAS_SINKS=layer.sinks is not None,
        )  # fmt: skip
        return out

    def _plan(self, slots: torch.Tensor, kv_len: torch.Tensor, tables: torch.Tensor) -> TritonPlan:
        return TritonPlan(slots // self._block_tokens, slots % self._block_tokens, kv_len, tables)

    def _parts(self, programs: int) -> int:
        """How many parts each sequence's keys are split into: a power of two."""
        wanted = -(-_PROGRAMS_PER_UNIT * self._units // programs)
        return min(_power(wanted), _MOST_PARTS)

    def _tensor(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


class _Static:
    """The lengths are read by the kernels themselves, so there is nothing to refresh."""

    def __init__(self, backend: TritonBackend, tensors: StepTensors) -> None:
        self._backend = backend
        self._tensors = tensors

    def refresh(self, context: ForwardContext) -> None:
        pass

    def plan(self) -> TritonPlan:
        return self._backend.plan_of(self._tensors)


def _power(number: int) -> int:
    """The least power of two that is not under `number`."""
    return 1 << max(number - 1, 0).bit_length()
