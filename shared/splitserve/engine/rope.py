"""RoPE that changes with the length of what is in the batch is pinned to one set of frequencies, at load."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_log = logging.getLogger("splitserve.engine")


@torch.no_grad()
def pin_longrope(model: PreTrainedModel, max_model_len: int) -> None:
    """Make "longrope" use its long factors always, if `max_model_len` is over the length that the short ones are for.

    transformers picks a set by the largest position of a forward: a long sequence in the batch would change the short
    ones. Up to that length the short set is used by itself, and nothing is changed.
    """
    for module, prefix, layer_type, original in _longropes(model):
        if max_model_len <= original:
            continue
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
            model.config, model.device, seq_len=original + 1, layer_type=layer_type
        )
        getattr(module, f"{prefix}original_inv_freq").copy_(frequencies)
        _log.info("longrope uses its long factors at every length", extra={"max_model_len": max_model_len})


def _longropes(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, str, str | None, int]]:
    """(module, prefix of its buffers, layer type, the length that its short factors are for)."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if rope_type == "longrope":
            yield module, "", None, model.config.rope_parameters["original_max_position_embeddings"]
        elif isinstance(rope_type, dict):
            for layer_type, kind in rope_type.items():
                if kind == "longrope":
                    parameters = model.config.rope_parameters[layer_type]
                    yield module, f"{layer_type}_", layer_type, parameters["original_max_position_embeddings"]
