"""Decode steps captured as CUDA graphs: one launch for a whole step, instead of hundreds of kernels launched from Python.

A graph is captured for a few numbers of rows; a step is padded to the next one. Padding rows stand at position 0 of a scratch
block that no sequence owns, so what they write harms nobody. What is captured is a function of tensors that stay in place;
`Record` is a parameter, so that all of this is tried without a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from splitserve.engine.attention.base import ForwardContext, LayerAttention
from splitserve.engine.batch import StepRow
from splitserve.engine.context import attention_context
from splitserve.engine.cuda.static import CapturableBackend, StaticAttention, StepTensors
from splitserve.engine.forward import PagedAttention, forward_context
from splitserve.kv.storage import KvStorage

_log = logging.getLogger("splitserve.engine")


class Graph(Protocol):
    """A captured step. `output` has the logits of the last replay."""

    @property
    def output(self) -> torch.Tensor: ...
    def replay(self) -> None: ...


Record = Callable[[Callable[[], torch.Tensor]], Graph]


@dataclass(frozen=True, slots=True, eq=False)
class Padded:
    """A decode step of a number of rows that a graph is there for; arrays as `StepTensors`."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    context: ForwardContext


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    tensors: StepTensors
    attention: StaticAttention[Any]
    graph: Graph


def sizes(most: int) -> tuple[int, ...]:
    """Numbers of rows to capture: powers of two, and `most`."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return (*powers, most)


def padded(rows: Sequence[StepRow], size: int, scratch: int, block_tokens: int) -> Padded:
    """`rows`, one token each, and behind them rows of a single token in block `scratch`."""
    padding = [StepRow((0,), 0, ((scratch,),))] * (size - len(rows))
    every = [*rows, *padding]
    context = forward_context(every, size, block_tokens)
    return Padded(np.array([row.ids[0] for row in every], dtype=np.int64), context.kv_len - 1, context)


class DecodeGraphs:
    """The captured decode steps of one model over one pool. `width`: blocks of the longest table that is served."""

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Mapping[torch.nn.Module, LayerAttention],
        backend: CapturableBackend[Any],
        storage: KvStorage,
        *,
        scratch: int,
        width: int,
        record: Record,
    ) -> None:
        self._model = model
        self._layers = layers
        self._backend = backend
        self._storage = storage
        self._scratch = scratch
        self._width = width
        self._record = record
        self._captured: dict[int, _Captured] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self._captured)

    @torch.inference_mode()
    def capture(self, numbers: Sequence[int]) -> None:
        """Capture steps of these numbers of rows, the largest first: the others then fit into its memory."""
        for number in sorted(numbers, reverse=True):
            tensors = StepTensors.zeros(number, self._width, self._storage.bytes.device)
            attention = self._backend.static(tensors, self._layers.values())
            step = padded((), number, self._scratch, self._storage.layout.block_tokens)
            self._fill(tensors, attention, step)
            self._captured[number] = _Captured(
                tensors, attention, self._record(self._step_of(tensors, attention, step.context))
            )
        self._captured = dict(sorted(self._captured.items()))
        _log.info("decode steps captured", extra={"rows": list(self._captured), "blocks": self._width})

    def takes(self, rows: Sequence[StepRow]) -> bool:
        """Whether `logits` answers these rows: one token each, and no more of them than were captured."""
        return (
            0 < len(rows) <= max(self._captured, default=0)
            and all(len(row.ids) == 1 for row in rows)
            and all(len(row.tables[0]) <= self._width for row in rows)
        )

    @torch.inference_mode()
    def logits(self, rows: Sequence[StepRow]) -> torch.Tensor:
        """`[len(rows), V]`, valid until the next call."""
        size = next(number for number in self._captured if number >= len(rows))
        captured = self._captured[size]
        step = padded(rows, size, self._scratch, self._storage.layout.block_tokens)
        self._fill(captured.tensors, captured.attention, step)
        captured.graph.replay()
        return captured.graph.output[: len(rows)]

    def _fill(self, tensors: StepTensors, attention: StaticAttention[Any], step: Padded) -> None:
        context = step.context
        pairs = (
            (tensors.ids, step.ids),
            (tensors.positions, step.positions),
            (tensors.slots, context.slots[0]),
            (tensors.kv_len, context.kv_len),
            (tensors.tables[:, : context.block_tables[0].shape[1]], context.block_tables[0]),
        )
        for tensor, array in pairs:
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        attention.refresh(context)

    def _step_of(
        self, tensors: StepTensors, attention: StaticAttention[Any], context: ForwardContext
    ) -> Callable[[], torch.Tensor]:
        every = torch.arange(len(tensors.ids), device=tensors.ids.device)

        def step() -> torch.Tensor:
            handler = PagedAttention(self._layers, self._backend, self._storage, context, attention.plan())
            with attention_context(handler):
                return self._model(
                    input_ids=tensors.ids[None],
                    position_ids=tensors.positions[None],
                    use_cache=False,
                    logits_to_keep=every,
                ).logits[0]

        return step


class CudaGraph:
    """`step` captured by torch; all graphs of a process's model may share one memory `pool`."""

    def __init__(self, step: Callable[[], torch.Tensor], pool: Any) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their workspaces at a first call, which a capture forbids
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the process (transfers of KV) may call CUDA meanwhile
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = step()

    def replay(self) -> None:
        self._graph.replay()


def record_on_gpu() -> Record:
    """Records into one memory pool."""
    pool = torch.cuda.graph_pool_handle()
    return lambda step: CudaGraph(step, pool)
