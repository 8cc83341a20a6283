"""The gate's third part: paged, chunked and ragged against transformers' own attention, on the same weights."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from splitserve.engine.attention.base import AttentionBackend
from splitserve.engine.batch import StepRow
from splitserve.engine.context import ATTENTION_NAME
from splitserve.engine.forward import PagedModel
from splitserve.engine.probe import Layers
from splitserve.errors import UnsupportedModel
from splitserve.kv.layout import KVLayout
from splitserve.kv.storage import KvStorage

Sequences = list[np.ndarray[Any, np.dtype[np.int64]]]

_LONGEST_WINDOW = 2048  # a longer one is not crossed: that would cost more than it shows
_TAIL = 5  # tokens fed one by one at the end of each sequence, whose logits are compared

# How far the logits of a position may be off, as a share of their spread. Rounding alone gives about 1e-6, 0.01 and 0.002.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@torch.inference_mode()
def check_against_reference(
    name: str,
    model: PreTrainedModel,
    layers: Layers,
    backend: AttentionBackend[Any],
    layout: KVLayout,
    max_model_len: int,
) -> float:
    """The worst difference found, as a share of the logits' spread. Raises UnsupportedModel where it is too large.

    Two sequences run together: one longer than the smallest window, fed in two chunks, one short, fed in one; then both
    decode. The median over positions decides in 16 bits (an expert chosen otherwise by rounding is not an error).
    """
    sequences = sequences_to_check(model.config.vocab_size, layers, max_model_len)
    paged = paged_logits(model, layers, backend, layout, sequences)
    with reference_attention(model, layers):
        expected = torch.cat([reference_logits(model, ids) for ids in sequences])
    difference = (paged - expected).float()
    spread = expected.float().std(-1).clamp(min=1e-6)
    errors = difference.square().mean(-1).sqrt() / spread
    tolerance = _TOLERANCE[model.dtype]
    error = float(errors.max() if model.dtype == torch.float32 else errors.median())
    if not error <= tolerance:  # a NaN must not pass
        raise UnsupportedModel(
            f"{name} cannot be served: with paged attention its logits are off by {error:.2g} of their spread, "
            f"more than {tolerance:g}"
        )
    return float(errors.max())


def sequences_to_check(vocabulary: int, layers: Layers, max_model_len: int) -> Sequences:
    """Ids of a long sequence and a short one."""
    windows = [layer.window for layer in layers.values() if layer.window and layer.window <= _LONGEST_WINDOW]
    long = max(40, min(windows, default=0) + 20)
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, max(min(size, max_model_len), 2 * _TAIL)) for size in (long, 17)]


def paged_logits(
    model: PreTrainedModel,
    layers: Layers,
    backend: AttentionBackend[Any],
    layout: KVLayout,
    sequences: Sequences,
) -> torch.Tensor:
    """`[2 * TAIL, V]`, sequence by sequence. Their blocks are interleaved, so that a wrong table shows."""
    blocks = max(-(-len(ids) // layout.block_tokens) for ids in sequences)
    storage = KvStorage(layout, 2 * blocks, device=model.device)
    paged = PagedModel(model, layers, backend, storage, model.device)
    tables = [[list(range(start, 2 * blocks, 2))] for start in (1, 0)]

    def row(sequence: int, start: int, stop: int) -> StepRow:
        return StepRow(sequences[sequence][start:stop].tolist(), start, tables[sequence])

    long, short = (len(ids) - _TAIL for ids in sequences)
    middle = max(long - 11, 1)
    paged.logits([row(0, 0, middle)], 0, [])
    paged.logits([row(1, 0, short), row(0, middle, long)], 0, [])
    steps = [
        paged.logits([row(0, long + i, long + i + 1), row(1, short + i, short + i + 1)], 2, [0, 1])
        for i in range(_TAIL)
    ]
    return torch.stack(steps).transpose(0, 1).flatten(0, 1)


def reference_logits(model: PreTrainedModel, ids: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
    """`[TAIL, V]`: of the positions of one sequence that are compared."""
    tensor = torch.from_numpy(ids).to(model.device)[None]
    return model(input_ids=tensor, use_cache=False, logits_to_keep=_TAIL).logits[0]


@contextmanager
def reference_attention(model: PreTrainedModel, layers: Layers) -> Generator[None]:
    """transformers' own attention: SDPA, or eager where a model needs what SDPA lacks."""
    by_hand = any(layer.softcap is not None or layer.sinks is not None for layer in layers.values())
    try:
        sdpa = getattr(model, "_supports_sdpa", False) and not by_hand
        model.set_attn_implementation("sdpa" if sdpa else "eager")
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
