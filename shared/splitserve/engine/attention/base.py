"""One interface for attention over paged KV; a backend a file.

Shapes: S rows (sequences) in a step, T tokens of all of them in one flat row, M blocks in the longest table, H KV heads,
Hq query heads, B tokens in a block, Dk and Dv dims of K and V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from splitserve.kv.storage import LayerView


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """What one attention layer asks for, found out once at load (`engine/gate`)."""

    layer: int
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    window: int | None = None  # a token sees itself and window - 1 before it; None: all
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [Hq] logits of a key that attracts weight and has no value
    source: int | None = None  # the layer whose KV this one reads instead of its own

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def kv_layer(self) -> int:
        return self.layer if self.source is None else self.source


@dataclass(frozen=True, slots=True, eq=False)
class ForwardContext:
    """Where each token of a forward stands: rows in batch order, decodes (one token each) first, then chunks.

    Row s feeds tokens [query_start[s], query_start[s + 1]) at positions [kv_len[s] - its count, kv_len[s]).
    """

    query_start: NDArray[np.int64]  # [S + 1]
    kv_len: NDArray[np.int64]  # [S], with this step's tokens
    num_decodes: int
    block_tables: tuple[NDArray[np.int64], ...]  # by group [S, M], rows padded with block 0
    slots: tuple[NDArray[np.int64], ...]  # by group [T]: block * block_tokens + offset in the block


PlanT = TypeVar("PlanT")


class AttentionBackend(Protocol, Generic[PlanT]):
    """Writes a step's K and V into the pool and attends over it."""

    name: str

    def supports(self, layer: LayerAttention) -> str | None:
        """None, or one clause saying why not."""
        ...

    def plan(self, context: ForwardContext) -> PlanT:
        """What all layers of a step share: made once a step."""
        ...

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: PlanT,
    ) -> torch.Tensor:
        """`query [T, Hq, Dk]`, `key [T, H, Dk]`, `value [T, H, Dv]` -> `[T, Hq, Dv]`. `view` is of `layer.kv_layer`."""
        ...
