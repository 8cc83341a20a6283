"""The gate's second part: a forward of three tokens, to see how the model calls its attention."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from splitserve.engine.attention.base import AttentionBackend, LayerAttention
from splitserve.engine.context import attention_context
from splitserve.engine.gate import declared_window
from splitserve.errors import UnsupportedModel

_TOKENS = 3
_NEEDED = ("input_ids", "position_ids", "logits_to_keep")

# Options that change no result of a causal forward, beside those that `_Recorder` reads
_HARMLESS = frozenset(
    {"dropout", "position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions"}
    | {"output_hidden_states", "return_dict", "logits_to_keep", "layer_idx", "layer_type", "num_items_in_batch"}
)


Layers = dict[torch.nn.Module, LayerAttention]


@torch.inference_mode()
def probe(name: str, model: PreTrainedModel, backend: AttentionBackend[Any]) -> Layers:
    """What each attention layer asks for. Raises UnsupportedModel where it cannot be given exactly.

    Every layer must have called the registered function exactly once: one that does its own attention, or none, shows here.
    """
    parameters = inspect.signature(model.forward).parameters
    missing = [argument for argument in _NEEDED if argument not in parameters]
    if missing:
        raise UnsupportedModel(f"{name} cannot be served: its forward takes no {', '.join(missing)}")
    recorder = _Recorder(name, model)
    ids = torch.arange(1, _TOKENS + 1, device=model.device)
    try:
        with attention_context(recorder):
            model(
                input_ids=ids[None],
                position_ids=torch.arange(_TOKENS, device=model.device)[None],
                use_cache=False,
                logits_to_keep=ids.new_zeros(1),
            )
    except UnsupportedModel:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError, NotImplementedError) as error:
        cause = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UnsupportedModel(f"{name} cannot be served: its forward failed without a cache: {cause[0]}") from error
    _check_calls(name, recorder, model.config.num_hidden_layers)
    for layer in recorder.layers.values():
        refusal = backend.supports(layer)
        if refusal is not None:
            raise UnsupportedModel(f"{name} cannot be served by the {backend.name} attention backend: {refusal}")
    return recorder.layers


def _check_calls(name: str, recorder: _Recorder, expected: int) -> None:
    calls = Counter(recorder.order)
    if sorted(calls.elements()) != list(range(expected)):
        raise UnsupportedModel(
            f"{name} cannot be served: {len(calls)} of its {expected} layers called the attention interface, "
            f"{len(recorder.order)} times; each must exactly once"
        )


class _Recorder:
    """Notes every call, and answers with zeros."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self._name = name
        self._config = model.config
        self._keys: dict[int, torch.Tensor] = {}  # of each layer that brought its own
        self.layers: Layers = {}
        self.order: list[int] = []

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        index = getattr(module, "layer_idx", None)
        layer = len(self.order) if index is None else int(index)
        self.order.append(layer)
        self._refuse_unknown(layer, mask, options)
        heads, tokens, k_dim = query.shape[1:]
        self.layers[module] = LayerAttention(
            layer=layer,
            heads=heads,
            kv_heads=key.shape[1],
            k_dim=k_dim,
            v_dim=value.shape[-1],
            scale=float(options["scaling"]) if options.get("scaling") is not None else k_dim**-0.5,
            window=self._window(layer, options.get("sliding_window")),
            softcap=options.get("softcap"),
            sinks=_sinks(options.get("s_aux")),
            source=self._source(layer, module, key),
        )
        return value.new_zeros(1, tokens, heads, value.shape[-1])

    def _refuse_unknown(self, layer: int, mask: torch.Tensor | None, options: Mapping[str, Any]) -> None:
        if mask is not None:
            raise self._refusal(layer, "it makes an attention mask of its own")
        if options.get("is_causal") is False:
            raise self._refusal(layer, "its attention is not causal")
        known = _HARMLESS | {"scaling", "sliding_window", "softcap", "s_aux", "is_causal"}
        for option, value in options.items():
            if option not in known and (isinstance(value, torch.Tensor) or callable(value)):
                raise self._refusal(layer, f"attention was given {option!r}, which is not known here")

    def _window(self, layer: int, given: int | None) -> int | None:
        declared = declared_window(self._config, layer)
        if given is not None and given != declared:
            raise self._refusal(layer, f"its config says a window of {declared}, its code one of {given}")
        return declared

    def _source(self, layer: int, module: torch.nn.Module, key: torch.Tensor) -> int | None:
        """The layer whose keys these are, for a layer that shares another's."""
        if not getattr(module, "is_kv_shared_layer", False):
            self._keys[layer] = key
            return None
        for other, theirs in self._keys.items():
            if theirs.data_ptr() == key.data_ptr():
                return other
        raise self._refusal(layer, "it shares the KV of another layer, and which one cannot be told")

    def _refusal(self, layer: int, cause: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self._name} cannot be served: in layer {layer}, {cause}")


def _sinks(sinks: torch.Tensor | None) -> torch.Tensor | None:
    return None if sinks is None else sinks.detach().float().reshape(-1)
