"""What a decode step reads, in tensors that stay where they are: a captured step is replayed over new contents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, TypeVar

import torch

from splitserve.engine.attention.base import AttentionBackend, ForwardContext, LayerAttention

PlanT = TypeVar("PlanT")
PlanT_co = TypeVar("PlanT_co", covariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """One token of each of S rows; all int64, on the device. A row's table is M wide, whatever of it is used."""

    ids: torch.Tensor  # [S]
    positions: torch.Tensor  # [S]
    slots: torch.Tensor  # [S]
    kv_len: torch.Tensor  # [S]
    tables: torch.Tensor  # [S, M]

    @classmethod
    def zeros(cls, rows: int, width: int, device: torch.device) -> StepTensors:
        ids, positions, slots, kv_len = torch.zeros(4, rows, dtype=torch.int64, device=device)
        return cls(ids, positions, slots, kv_len, torch.zeros(rows, width, dtype=torch.int64, device=device))


class StaticAttention(Protocol[PlanT_co]):
    """A backend's half of a step that is captured once and replayed."""

    def refresh(self, context: ForwardContext) -> None:
        """Before each run of the step, outside of the capture: `context` is what the tensors now say."""
        ...

    def plan(self) -> PlanT_co:
        """Inside the capture, before the first layer: what it computes is computed anew in each replay."""
        ...


class CapturableBackend(AttentionBackend[PlanT], Protocol[PlanT]):
    """A backend whose decode step launches the same kernels on the same addresses whatever the lengths are."""

    def static(self, tensors: StepTensors, layers: Iterable[LayerAttention]) -> StaticAttention[PlanT]:
        """For steps of as many rows as `tensors` has."""
        ...


def is_capturable(backend: AttentionBackend[Any]) -> TypeGuard[CapturableBackend[Any]]:
    return hasattr(backend, "static")
