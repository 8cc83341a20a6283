"""A model over paged KV: rows of a step in, logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from splitserve.engine.attention.base import AttentionBackend, ForwardContext, LayerAttention
from splitserve.engine.attention.native_backend import NativePlan, native_plan
from splitserve.engine.batch import StepRow
from splitserve.engine.context import attention_context
from splitserve.kv.storage import KvStorage, LayerView


class PagedModel:
    """A transformers causal LM whose attention reads and writes `storage`.

    `layers` maps each attention module to what it asks for (`engine/gate` finds that out).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Mapping[torch.nn.Module, LayerAttention],
        backend: AttentionBackend[Any],
        storage: KvStorage,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model = model
        self._layers = layers
        self._backend = backend
        self._storage = storage
        self._device = torch.device(device)

    @torch.inference_mode()
    def logits(self, rows: Sequence[StepRow], num_decodes: int, keep: Sequence[int]) -> torch.Tensor:
        """Feed the rows, write their KV, and give the logits `[len(keep), V]` of tokens `keep` of the flat batch, in
        order, each the last of its row."""
        context = forward_context(rows, num_decodes, self._storage.layout.block_tokens)
        ids = np.fromiter(chain.from_iterable(row.ids for row in rows), dtype=np.int64)
        handler = PagedAttention(self._layers, self._backend, self._storage, context, keep=keep)
        with attention_context(handler):
            output = self._model(
                input_ids=self._to_device(ids)[None],
                position_ids=self._to_device(_positions(context))[None],
                use_cache=False,
                logits_to_keep=self._to_device(np.array(keep, dtype=np.int64)),
            )
        return output.logits[0]

    def wait(self) -> None:
        """Until all KV of the forwards so far is written."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _to_device(self, array: NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


class PagedAttention:
    """Where the attention of one step is answered, and where its fused layers look. `plan`: the backend's, None: made of
    `context` when it is first needed. `keep`: the tokens whose logits are wanted, each the last of its row; None: all."""

    def __init__(
        self,
        layers: Mapping[torch.nn.Module, LayerAttention],
        backend: AttentionBackend[Any],
        storage: KvStorage,
        context: ForwardContext,
        plan: object = None,
        keep: Sequence[int] | None = None,
    ) -> None:
        self._layers = layers
        self._backend = backend
        self._storage = storage
        self._context = context
        self._given = plan
        self._keep = keep

    @cached_property
    def _plan(self) -> Any:
        return self._backend.plan(self._context) if self._given is None else self._given

    @cached_property
    def places(self) -> NativePlan:
        return native_plan(self._context, self._keep)

    def view(self, layer: LayerAttention) -> LayerView:
        return self._storage.view(layer.kv_layer)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        layer = self._layers[module]
        view = self.view(layer)
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        return self._backend.forward(layer, query, key, value, view, self._plan)[None]


def forward_context(rows: Sequence[StepRow], num_decodes: int, block_tokens: int) -> ForwardContext:
    """Where each token of `rows` stands."""
    counts = np.fromiter((len(row.ids) for row in rows), dtype=np.int64, count=len(rows))
    starts = np.fromiter((row.start for row in rows), dtype=np.int64, count=len(rows))
    query_start = np.concatenate([[0], np.cumsum(counts)])
    groups = range(len(rows[0].tables))
    tables = tuple(_padded([row.tables[group] for row in rows]) for group in groups)
    context = ForwardContext(query_start, starts + counts, num_decodes, tables, ())
    position, row = _positions(context), np.repeat(np.arange(len(rows)), counts)
    slots = tuple(
        table[row, position // block_tokens] * block_tokens + position % block_tokens for table in context.block_tables
    )
    return ForwardContext(query_start, context.kv_len, num_decodes, tables, slots)


def _positions(context: ForwardContext) -> NDArray[np.int64]:
    """`[T]`: the position of each token in its sequence."""
    counts = np.diff(context.query_start)
    return np.arange(context.query_start[-1]) + np.repeat(context.kv_len - context.query_start[1:], counts)


def _padded(tables: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Block tables as one array, short ones padded with block 0 (gathered at most, and masked)."""
    out = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in zip(out, tables):
        row[: len(table)] = table
    return out
