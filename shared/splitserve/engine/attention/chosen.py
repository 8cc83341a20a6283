"""Which backend serves: the reference at once, the kernels from the step after they are there and have shown to be right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from splitserve.engine.attention.base import AttentionBackend, ForwardContext, LayerAttention
from splitserve.kv.storage import LayerView


@dataclass(frozen=True, slots=True)
class ChosenPlan:
    """A step stays with the backend that planned it."""

    backend: AttentionBackend[Any]
    plan: object


class ChosenBackend(AttentionBackend[ChosenPlan]):
    """`reference` until `promote`. Both read and write the same pool, so they change between any two steps."""

    def __init__(self, reference: AttentionBackend[Any]) -> None:
        self._current = reference

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only, and it changes
        return self._current.name

    @property
    def current(self) -> AttentionBackend[Any]:
        """What answers the next step."""
        return self._current

    def promote(self, backend: AttentionBackend[Any]) -> None:
        """From the next step on. Any thread may call it."""
        self._current = backend

    def supports(self, layer: LayerAttention) -> str | None:
        return self._current.supports(layer)

    def plan(self, context: ForwardContext) -> ChosenPlan:
        backend = self._current
        return ChosenPlan(backend, backend.plan(context))

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: ChosenPlan,
    ) -> torch.Tensor:
        return plan.backend.forward(layer, query, key, value, view, plan.plan)
