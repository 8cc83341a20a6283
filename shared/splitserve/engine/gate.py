"""The load gate: which models may be served, found out by asking and by trying, never by a list of names.

In order: what the config says (`check_config`, before any weight is read), what a dummy forward shows (`probe`), and whether
chunked, ragged, paged attention gives the same logits as transformers' own (`check_against_reference`). Each refusal is one
line that names the model and the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from splitserve.errors import UnsupportedModel

_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})


def check_config(name: str, config: PretrainedConfig, max_model_len: int) -> None:
    """Raises UnsupportedModel for what the config alone rules out."""
    for check in _CHECKS:
        cause = check(config, max_model_len)
        if cause is not None:
            raise UnsupportedModel(f"{name} cannot be served: {cause}")


def rope_parameters(config: PretrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Each set of RoPE parameters in the config: one, or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (value for value in parameters.values() if isinstance(value, Mapping))


def declared_window(config: PretrainedConfig, layer: int) -> int | None:
    """The sliding window that the config gives a layer: where `layer_types` says so, without them everywhere."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _encoder_decoder(config: PretrainedConfig, _: int) -> str | None:
    return "it is an encoder-decoder model" if config.is_encoder_decoder else None


def _multimodal(config: PretrainedConfig, _: int) -> str | None:
    parts = sorted(part for part in getattr(config, "sub_configs", {}) if getattr(config, part, None) is not None)
    if parts or config.get_text_config() is not config:
        return f"it is a multimodal model ({', '.join(parts)}); only text models are served"
    return None


def _quantised(config: PretrainedConfig, _: int) -> str | None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return None
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else quantisation.quant_method
    return f"its weights are quantised ({method}); use a checkpoint in float32, bfloat16 or float16"


def _layer_types(config: PretrainedConfig, _: int) -> str | None:
    other = sorted(set(_listed_layers(config)) - _SERVED_LAYERS)
    return f"it has layers of type {', '.join(other)}; only full and sliding attention are served" if other else None


def _listed_layers(config: PretrainedConfig) -> list[str]:
    if getattr(config, "layer_types", None):
        return list(config.layer_types)
    if getattr(config, "layers_block_type", None):
        return ["full_attention" if kind == "attention" else kind for kind in config.layers_block_type]
    return []


def _rope(config: PretrainedConfig, max_model_len: int) -> str | None:
    for parameters in rope_parameters(config):
        rope_type = parameters.get("rope_type", "default")
        if "dynamic" in rope_type:
            return f"its RoPE is {rope_type!r}, which changes with the longest sequence in a batch"
    return None


def _not_causal(config: PretrainedConfig, _: int) -> str | None:
    return "its attention is not causal" if getattr(config, "is_causal", True) is False else None


_CHECKS: tuple[Callable[[PretrainedConfig, int], str | None], ...] = (
    _encoder_decoder,
    _multimodal,
    _quantised,
    _layer_types,
    _rope,
    _not_causal,
)
