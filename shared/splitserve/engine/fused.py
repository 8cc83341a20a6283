"""Decoder layers of the Llama family as calls of the kernels' library, in place of some thirty torch operators each.

A layer is recognised by its class (`_FAMILIES`): what another class computes is not known here, and it keeps its operators.
Both forms read and write the same pool, so a model may change from one to the other between any two steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from splitserve.engine.attention.base import LayerAttention
from splitserve.engine.context import current_step
from splitserve.engine.native.library import amx_allowed

_MULTIPLE = 32  # of every size, for the tiles


@dataclass(frozen=True, slots=True)
class Family:
    """Where a decoder layer's class keeps its norms, and what a norm multiplies by: its weight, or one more. `one_rope`: all
    layers have the same position embeddings."""

    norm_middle: str = "post_attention_layernorm"
    norm_attended: str | None = None
    norm_mlp: str | None = None
    norm_heads: bool = False
    plus_one: bool = False
    one_rope: bool = True


_GEMMA3 = Family(
    norm_middle="pre_feedforward_layernorm",
    norm_attended="post_attention_layernorm",
    norm_mlp="post_feedforward_layernorm",
    norm_heads=True,
    plus_one=True,
    one_rope=False,
)
_FAMILIES: Mapping[str, Family] = {
    "LlamaDecoderLayer": Family(),
    "MistralDecoderLayer": Family(),
    "Qwen2DecoderLayer": Family(),
    "Qwen3DecoderLayer": Family(norm_heads=True),
    "Gemma3DecoderLayer": _GEMMA3,
}
_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list that the model's forward goes through, where it is the usual one."""
    layers = getattr(model.base_model, "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None


def fusing_refusal(model: PreTrainedModel, attention: Mapping[nn.Module, LayerAttention]) -> str | None:
    """None where every layer of `model` can be one call, else one clause saying why not."""
    layers = decoder_layers(model)
    if layers is None or not len(layers):
        return f"{type(model).__name__} keeps its layers elsewhere"
    layer: Any
    for layer in layers:
        family = _FAMILIES.get(type(layer).__name__)
        if family is None:
            return f"{type(layer).__name__} is none of {', '.join(_FAMILIES)}"
        asked = attention.get(layer.self_attn)
        if asked is None or asked.source is not None or asked.k_dim != asked.v_dim:
            return "its layers share KV, or K and V have other sizes"
        sizes = (layer.hidden_size, layer.mlp.gate_proj.out_features, asked.k_dim)
        if any(size % _MULTIPLE for size in sizes):
            return f"sizes {sizes} are no multiples of {_MULTIPLE}"
        if layer.mlp.gate_proj.bias is not None or layer.mlp.down_proj.bias is not None:
            return "its MLP has biases"
        if _activation(layer.mlp.act_fn) is None:
            return f"its MLP's {type(layer.mlp.act_fn).__name__} is neither SiLU nor GELU by tanh"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """Fused layers for a model, with weights of their own. `head`: None where the model's own stays."""

    runs: list[FusedRun]
    head: FusedHead | None

    @classmethod
    def of(cls, model: PreTrainedModel, attention: Mapping[nn.Module, LayerAttention]) -> Fusion:
        """`fusing_refusal` must be None."""
        amx = amx_allowed()
        layers: list[Any] = list(decoder_layers(model) or ())
        together = len(layers) if _FAMILIES[type(layers[0]).__name__].one_rope else 1
        runs = [layers[at : at + together] for at in range(0, len(layers), together)]
        fused = [FusedRun(run, attention, amx, last=run is runs[-1]) for run in runs]
        return cls(fused, _fused_head(model, amx))

    def tried_on(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model` with these layers, sharing all else with it; itself stays as it is."""
        base, shell = copy.copy(model.base_model), copy.copy(model)
        for copied in (base, shell):  # a copy shares the table of its parts with the original
            copied._modules = dict(copied._modules)  # pyright: ignore[reportPrivateUsage]
        base.add_module("layers", nn.ModuleList(self.runs))
        shell.add_module(model.base_model_prefix, base)
        if self.head is not None:
            shell.set_output_embeddings(self.head)
        return shell

    def put_into(self, model: PreTrainedModel) -> None:
        """For good. A step under way goes on through the layers that it began with."""
        model.base_model.add_module("layers", nn.ModuleList(self.runs))
        if self.head is not None:
            model.set_output_embeddings(self.head)


class FusedRun(nn.Module):
    """Takes the place of neighbouring decoder layers that have the same position embeddings: `hidden [1, T, H]` ->
    `[1, T, H]`, where the step's tokens stand taken from `context`.

    After a model's `last` layer only tokens are looked at whose logits are kept: the others' rows are zeros.
    """

    def __init__(
        self, layers: Sequence[Any], attention: Mapping[nn.Module, LayerAttention], amx: bool, *, last: bool
    ) -> None:
        super().__init__()
        self._last = last
        self._asked = [attention[layer.self_attn] for layer in layers]
        self._kernels: Any = torch.classes.splitserve.DecoderRun()
        for layer, asked in zip(layers, self._asked):
            self._kernels.add(_kernel(layer, asked, amx))

    def forward(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> torch.Tensor:
        step = current_step()
        views, places = [step.view(asked) for asked in self._asked], step.places
        cos, sin = position_embeddings
        return self._kernels.forward(
            hidden_states[0],
            cos[0],
            sin[0],
            places.query_start,
            places.kv_len,
            places.table,
            places.slots,
            places.num_decodes,
            [view.k for view in views],
            [view.v for view in views],
            places.keep if self._last else None,
        )[None]


def _kernel(layer: Any, asked: LayerAttention, amx: bool) -> Any:
    """A decoder layer as the library's, with packed weights of its own."""
    family = _FAMILIES[type(layer).__name__]
    attention, mlp = layer.self_attn, layer.mlp
    projections: tuple[Any, ...] = (attention.q_proj, attention.k_proj, attention.v_proj)
    sizes = (layer.hidden_size, asked.heads, asked.kv_heads, asked.k_dim, mlp.gate_proj.out_features)
    flags = (asked.window or 0, int(_activation(mlp.act_fn) == "gelu"), int(amx))
    packed = packed_weights(
        torch.cat([projection.weight.detach() for projection in projections]),
        attention.o_proj.weight.detach(),
        _in_turn(mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()),
        mlp.down_proj.weight.detach(),
    )

    def norm(owner: Any, name: str | None) -> torch.Tensor | None:
        if name is None:
            return None
        weight = getattr(owner, name).weight.detach().float()
        return weight + 1 if family.plus_one else weight

    heads = ("q_norm", "k_norm") if family.norm_heads else (None, None)
    norms = [
        norm(layer, "input_layernorm"),
        norm(layer, family.norm_middle),
        *(norm(attention, name) for name in heads),
        norm(layer, family.norm_attended),
        norm(layer, family.norm_mlp),
    ]
    return torch.classes.splitserve.DecoderLayer(
        [*sizes, *flags],
        asked.scale,
        _epsilon(layer.input_layernorm),
        packed,
        norms,
        [_bias(projections), _bias((attention.o_proj,))],
    )


class FusedHead(nn.Module):
    """Takes the place of a linear layer without bias: `x [..., K]` -> float32 `[..., N]`, as the sums come."""

    def __init__(self, linear: Any, amx: bool) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        (self._packed,) = packed_weights(weight)
        self._amx = amx

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        y = torch.ops.splitserve.linear(rows, self._packed, self.out_features, self._amx)
        return y.view(*x.shape[:-1], self.out_features)


def _fused_head(model: PreTrainedModel, amx: bool) -> FusedHead | None:
    """For the model's output layer, where it is a plain one of sizes that the tiles take."""
    head: Any = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or any(size % _MULTIPLE for size in head.weight.shape):
        return None
    return FusedHead(head, amx)


def packed_weights(*weights: torch.Tensor) -> list[torch.Tensor]:
    """Weights `[N, K]` as the kernels read them, one behind the other in memory of their own."""
    sizes = [2 * weight.numel() for weight in weights]
    memory = torch.ops.splitserve.weight_memory(sum(sizes))
    packed = list(memory.split(sizes))
    for weight, to in zip(weights, packed):
        torch.ops.splitserve.pack_weight(weight, to)
    return packed


def _in_turn(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`[2 N, K]`: 32 rows of one, 32 of the other, and so on."""
    width = gate.shape[1]
    return torch.stack([gate.view(-1, _MULTIPLE, width), up.view(-1, _MULTIPLE, width)], 1).view(-1, width)


def _bias(projections: tuple[Any, ...]) -> torch.Tensor | None:
    if all(projection.bias is None for projection in projections):
        return None
    return torch.cat([torch.zeros(p.out_features) if p.bias is None else p.bias.detach().float() for p in projections])


def _epsilon(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def _activation(module: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Which of `_ACTIVATIONS` it computes, told by what it gives."""
    x = torch.linspace(-6, 6, 49)
    with torch.inference_mode():
        y = module(x)
    return next((name for name, known in _ACTIVATIONS.items() if torch.allclose(y, known(x), atol=1e-5)), None)
