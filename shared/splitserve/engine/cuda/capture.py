"""Whether decode steps are served from graphs: captured at start, and held against the same steps launched one by one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from splitserve.engine.attention.base import AttentionBackend, LayerAttention
from splitserve.engine.batch import StepRow
from splitserve.engine.cuda.graphs import DecodeGraphs, Record, sizes
from splitserve.engine.cuda.phased import PhasedBackend
from splitserve.engine.cuda.static import is_capturable
from splitserve.engine.forward import PagedModel
from splitserve.kv.storage import KvStorage

logger = logging.getLogger("splitserve.engine")

_BOUND = 0.1  # of the logits' spread: what 16 bits may give when products are summed in another order
_STEPS = 3  # tokens of each row in the trial


class GraphedModel:
    """`eager`, but steps of decodes alone out of `graphs`."""

    def __init__(self, eager: PagedModel, graphs: DecodeGraphs) -> None:
        self._eager = eager
        self._graphs = graphs

    def logits(self, rows: Sequence[StepRow], num_decodes: int, keep: Sequence[int]) -> torch.Tensor:
        """As `PagedModel.logits`; valid until the next call."""
        if num_decodes == len(rows) == len(keep) and self._graphs.takes(rows):
            return self._graphs.logits(rows)
        return self._eager.logits(rows, num_decodes, keep)

    def wait(self) -> None:
        self._eager.wait()


def capture_decodes(
    model: torch.nn.Module,
    layers: Mapping[torch.nn.Module, LayerAttention],
    backend: AttentionBackend[Any],
    storage: KvStorage,
    eager: PagedModel,
    *,
    blocks: int,
    width: int,
    most: int,
    record: Record,
) -> DecodeGraphs | None:
    """Graphs for up to `most` rows, or None with a log line saying why not. Call it before the pool holds anything.

    `storage` has one block more than the pool's `blocks`, for padding. `width`: blocks of the longest table.
    """
    decodes = backend.decodes if isinstance(backend, PhasedBackend) else backend
    if not is_capturable(decodes):
        return _without(f"attention by {backend.name} cannot be captured")
    graphs = DecodeGraphs(model, layers, decodes, storage, scratch=blocks, width=width, record=record)
    numbers = sizes(min(most, blocks))
    try:
        graphs.capture(numbers)
        worst = max(_difference(graphs, eager, number, storage.layout.block_tokens) for number in numbers)
    except RuntimeError:  # what torch and CUDA raise where a model does what a capture forbids
        logger.exception("decode steps cannot be captured")
        return None
    if not worst <= _BOUND:  # a NaN must not pass
        return _without(f"captured steps are off by {worst:.2g} of the logits' spread, the bound is {_BOUND:g}")
    return graphs


@torch.inference_mode()
def _difference(graphs: DecodeGraphs, eager: PagedModel, rows: int, block_tokens: int) -> float:
    """A few tokens of `rows` sequences both ways, over the same blocks; the largest error as a share of the spread."""
    worst = 0.0
    for position in range(min(_STEPS, block_tokens)):
        step = [StepRow((1 + row + position,), position, ((row,),)) for row in range(rows)]
        expected = eager.logits(step, rows, range(rows)).float()
        errors = (graphs.logits(step).float() - expected).square().mean(-1).sqrt()
        worst = max(worst, float((errors / expected.std(-1).clamp(min=1e-6)).max()))
    return worst


def _without(reason: str) -> None:
    logger.info("decode steps are launched kernel by kernel", extra={"reason": reason})
