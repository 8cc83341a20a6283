"""Captured steps without a GPU: a graph that calls what it recorded, and a backend in plain torch that can be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

from splitserve.engine.attention.base import ForwardContext, LayerAttention
from splitserve.engine.cuda.static import CapturableBackend, StepTensors
from splitserve.kv.storage import LayerView


class Replayed:
    """As a CUDA graph: `output` stays where it is, and each replay reads the recorded tensors anew."""

    def __init__(self, step: Callable[[], torch.Tensor]) -> None:
        self._step = step
        self.output = step().clone()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self._step())


class GatherBackend(CapturableBackend[StepTensors]):
    """Attends over whole tables, whatever the lengths: the shapes of a step do not depend on them. Decodes only."""

    name = "gather"

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self.refreshed = 0

    def supports(self, layer: LayerAttention) -> str | None:
        return None

    def plan(self, context: ForwardContext) -> StepTensors:
        slots, kv_len, tables = map(torch.from_numpy, (context.slots[0], context.kv_len, context.block_tables[0]))
        return StepTensors(slots, kv_len - 1, slots, kv_len, tables)

    def static(self, tensors: StepTensors, layers: Iterable[LayerAttention]) -> _Static:
        return _Static(self, tensors)

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: StepTensors,
    ) -> torch.Tensor:
        block, offset = plan.slots // self._block_tokens, plan.slots % self._block_tokens
        view.k[block, :, offset] = key
        view.v[block, :, offset] = value
        k, v = (part[plan.tables].transpose(1, 2).flatten(2, 3) for part in (view.k, view.v))
        seen = torch.arange(k.shape[2]) < plan.kv_len[:, None]
        return functional.scaled_dot_product_attention(
            query.unsqueeze(2), k, v, seen[:, None, None], scale=layer.scale, enable_gqa=True
        ).squeeze(2)


class _Static:
    def __init__(self, backend: GatherBackend, tensors: StepTensors) -> None:
        self._backend = backend
        self._tensors = tensors

    def refresh(self, context: ForwardContext) -> None:
        self._backend.refreshed += 1

    def plan(self) -> StepTensors:
        return self._tensors
