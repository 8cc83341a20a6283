"""Attention by FlashInfer over our own pool: its layout "HND" with our strides, one plan a step and layer shape.

Takes a step of decodes alone or of chunks alone. FlashInfer is a parameter (the imported package), so that what it is given
is tried without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from splitserve.engine.attention.base import ForwardContext, LayerAttention
from splitserve.engine.cuda.pages import Pages, pages_of
from splitserve.engine.cuda.static import CapturableBackend, StepTensors
from splitserve.kv.storage import LayerView

_WORKSPACE = 128 << 20  # bytes; what its documentation recommends
_DIMS = (64, 128, 256)
_TENSOR_CORE_GROUP = 4  # query heads per KV head from which its decode is faster as a matrix product


@dataclass(frozen=True, slots=True)
class Shape:
    """Layers of one shape share a plan."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None
    softcap: float | None

    @classmethod
    def of(cls, layer: LayerAttention) -> Shape:
        return cls(layer.heads, layer.kv_heads, layer.k_dim, layer.scale, layer.window, layer.softcap)


@dataclass(slots=True, eq=False)
class FlashInferPlan:
    """`wrappers` are those of this step that are planned; more are planned when a layer first asks."""

    block: torch.Tensor  # [T]
    offset: torch.Tensor  # [T]
    context: ForwardContext | None
    pages: Pages | None
    wrappers: dict[Shape, Any]


class FlashInferBackend(CapturableBackend[FlashInferPlan]):
    """See the module."""

    name = "flashinfer"

    def __init__(self, flashinfer: Any, block_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self._flashinfer = flashinfer
        self._block_tokens = block_tokens
        self._device = device
        self._dtype = dtype
        self._workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)  # of all wrappers: they run in turn
        self._decode: dict[Shape, Any] = {}
        self._prefill: dict[Shape, Any] = {}

    def supports(self, layer: LayerAttention) -> str | None:
        if self._dtype not in (torch.bfloat16, torch.float16):
            return f"FlashInfer is for 16 bits, not {self._dtype}"
        if layer.k_dim != layer.v_dim or layer.k_dim not in _DIMS:
            return f"heads of {layer.k_dim} and {layer.v_dim} dims: FlashInfer takes equal ones of {_DIMS}"
        if layer.heads % layer.kv_heads:
            return f"{layer.heads} query heads do not divide among {layer.kv_heads} KV heads"
        return "FlashInfer is not asked for sinks here" if layer.sinks is not None else None

    def plan(self, context: ForwardContext) -> FlashInferPlan:
        if context.num_decodes not in (0, len(context.kv_len)):
            raise ValueError(f"{context.num_decodes} decodes and {len(context.kv_len)} rows: only one kind is taken")
        slots = _tensor(context.slots[0]).to(self._device, non_blocking=True)
        return FlashInferPlan(
            slots // self._block_tokens, slots % self._block_tokens, context, pages_of(context, self._block_tokens), {}
        )

    def static(self, tensors: StepTensors, layers: Iterable[LayerAttention]) -> _Static:
        return _Static(self, tensors, {Shape.of(layer) for layer in layers})

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: FlashInferPlan,
    ) -> torch.Tensor:
        if layer.source is None:
            view.k[plan.block, :, plan.offset] = key
            view.v[plan.block, :, plan.offset] = value
        shape = Shape.of(layer)
        if shape not in plan.wrappers:
            plan.wrappers[shape] = self._planned(shape, plan)
        return plan.wrappers[shape].run(query.contiguous(), (view.k, view.v))

    def captured_plan(self, tensors: StepTensors, wrappers: dict[Shape, Any]) -> FlashInferPlan:
        """Over wrappers that are planned already."""
        return FlashInferPlan(
            tensors.slots // self._block_tokens, tensors.slots % self._block_tokens, None, None, wrappers
        )

    def decode_wrapper(self, shape: Shape, **buffers: Any) -> Any:
        return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "HND",
            use_tensor_cores=shape.heads // shape.kv_heads >= _TENSOR_CORE_GROUP,
            **buffers,
        )

    def plan_decode(self, wrapper: Any, shape: Shape, context: ForwardContext) -> None:
        pages = pages_of(context, self._block_tokens)
        wrapper.plan(*_of(pages), shape.heads, shape.kv_heads, shape.dim, self._block_tokens, **self._options(shape))

    def _planned(self, shape: Shape, plan: FlashInferPlan) -> Any:
        if plan.context is None or plan.pages is None:
            raise ValueError(f"a captured step has no plan for layers of {shape}")
        if plan.context.num_decodes:
            if shape not in self._decode:
                self._decode[shape] = self.decode_wrapper(shape)
            self.plan_decode(self._decode[shape], shape, plan.context)
            return self._decode[shape]
        if shape not in self._prefill:
            self._prefill[shape] = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        starts = _tensor(plan.context.query_start.astype(np.int32))
        self._prefill[shape].plan(
            starts, *_of(plan.pages), shape.heads, shape.kv_heads, shape.dim, self._block_tokens, causal=True,
            **self._options(shape),
        )  # fmt: skip
        return self._prefill[shape]

    def _options(self, shape: Shape) -> dict[str, Any]:
        return {
            "sm_scale": shape.scale,
            "window_left": -1 if shape.window is None else shape.window - 1,  # tokens seen before one's own
            "logits_soft_cap": shape.softcap,
            "q_data_type": self._dtype,
            "kv_data_type": self._dtype,
        }


class _Static:
    """Wrappers for one number of rows, whose buffers FlashInfer fills anew at each plan."""

    def __init__(self, backend: FlashInferBackend, tensors: StepTensors, shapes: Iterable[Shape]) -> None:
        rows, width = tensors.tables.shape

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=tensors.tables.device)

        self._backend = backend
        self._tensors = tensors
        self._wrappers = {
            shape: backend.decode_wrapper(
                shape,
                use_cuda_graph=True,
                paged_kv_indptr_buffer=buffer(rows + 1),
                paged_kv_indices_buffer=buffer(rows * width),
                paged_kv_last_page_len_buffer=buffer(rows),
            )
            for shape in shapes
        }

    def refresh(self, context: ForwardContext) -> None:
        for shape, wrapper in self._wrappers.items():
            self._backend.plan_decode(wrapper, shape, context)

    def plan(self) -> FlashInferPlan:
        return self._backend.captured_plan(self._tensors, self._wrappers)


def _of(pages: Pages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _tensor(pages.indptr), _tensor(pages.indices), _tensor(pages.last_len)


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
