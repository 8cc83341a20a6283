"""What a model's logits are in float32: what its fast path is held against before it serves.

The weights are those of the checkpoint, the arithmetic is transformers' own. A module's weights are widened while it runs,
so that the memory of one is what this costs.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from splitserve.engine.attention.base import AttentionBackend
from splitserve.engine.probe import Layers
from splitserve.engine.selfcheck import (
    Sequences,
    paged_logits,
    reference_attention,
    reference_logits,
    sequences_to_check,
)
from splitserve.kv.layout import KVLayout


@dataclass(frozen=True, slots=True, eq=False)
class Exact:
    """`logits [P, V]` in float32 at the positions of `sequences` that `selfcheck` looks at."""

    sequences: Sequences
    logits: torch.Tensor

    def error(self, model: PreTrainedModel, layers: Layers, backend: AttentionBackend[Any], layout: KVLayout) -> float:
        """How far `model` over paged KV is off at the median position, as a share of the logits' spread there."""
        difference = paged_logits(model, layers, backend, layout, self.sequences).float() - self.logits
        return float((difference.square().mean(-1).sqrt() / self.logits.std(-1).clamp(min=1e-6)).median())


@torch.inference_mode()
def exact_logits(model: PreTrainedModel, layers: Layers, max_model_len: int) -> Exact:
    """Of the model as it was read, before its linear layers are packed."""
    sequences = sequences_to_check(model.config.vocab_size, layers, max_model_len)
    with reference_attention(model, layers), _widened(model):
        logits = torch.cat([reference_logits(model, ids) for ids in sequences])
    return Exact(sequences, logits.float())


@contextmanager
def _widened(model: nn.Module) -> Generator[None]:
    """Every module that has weights of its own runs with them in float32."""
    kept: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def widen(module: nn.Module, _inputs: Any) -> None:
        kept[module] = [(parameter, parameter.data) for parameter in module.parameters(recurse=False)]
        for parameter, data in kept[module]:
            parameter.data = data.float()

    def restore(module: nn.Module, _inputs: Any, _output: Any) -> None:
        for parameter, data in kept.pop(module):
            parameter.data = data

    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [owner.register_forward_pre_hook(widen) for owner in owners]
    hooks += [owner.register_forward_hook(restore) for owner in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for pairs in kept.values():  # of a forward that failed on its way
            for parameter, data in pairs:
                parameter.data = data
