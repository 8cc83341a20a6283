"""Two backends as one: the decodes of a step by one that is made for them, its chunks by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from splitserve.engine.attention.base import AttentionBackend, ForwardContext, LayerAttention
from splitserve.kv.storage import LayerView


@dataclass(frozen=True, slots=True)
class PhasedPlan:
    """Each side's plan, None where the step has nothing for it. The first `decodes` tokens are decodes."""

    decodes: int
    of_decodes: object | None
    of_chunks: object | None


class PhasedBackend(AttentionBackend[PhasedPlan]):
    """See the module. Both write the KV of their own tokens into the same pool."""

    def __init__(self, decodes: AttentionBackend[Any], chunks: AttentionBackend[Any]) -> None:
        self.decodes = decodes
        self.chunks = chunks
        self.name = f"{decodes.name} decode, {chunks.name} prefill"

    def supports(self, layer: LayerAttention) -> str | None:
        return self.decodes.supports(layer) or self.chunks.supports(layer)

    def plan(self, context: ForwardContext) -> PhasedPlan:
        count = context.num_decodes
        decodes, chunks = rows_of(context, 0, count), rows_of(context, count, len(context.kv_len))
        return PhasedPlan(
            count,
            self.decodes.plan(decodes) if decodes else None,
            self.chunks.plan(chunks) if chunks else None,
        )

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: PhasedPlan,
    ) -> torch.Tensor:
        n = plan.decodes
        if plan.of_chunks is None:
            return self.decodes.forward(layer, query, key, value, view, plan.of_decodes)
        if plan.of_decodes is None:
            return self.chunks.forward(layer, query, key, value, view, plan.of_chunks)
        return torch.cat(
            [
                self.decodes.forward(layer, query[:n], key[:n], value[:n], view, plan.of_decodes),
                self.chunks.forward(layer, query[n:], key[n:], value[n:], view, plan.of_chunks),
            ]
        )


def rows_of(context: ForwardContext, first: int, stop: int) -> ForwardContext | None:
    """Those rows as a step of their own; None for no rows."""
    if first == stop:
        return None
    begin, end = context.query_start[first], context.query_start[stop]
    return ForwardContext(
        query_start=context.query_start[first : stop + 1] - begin,
        kv_len=context.kv_len[first:stop],
        num_decodes=max(0, min(stop, context.num_decodes) - first),
        block_tables=tuple(table[first:stop] for table in context.block_tables),
        slots=tuple(slots[begin:end] for slots in context.slots),
    )
