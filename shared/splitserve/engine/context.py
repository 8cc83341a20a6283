"""The one piece of thread-local state: who answers a model's attention calls during the current forward.

Not passed as keyword arguments of `forward`, for some models drop those on the way to their attention layers.
`attention_context` sets it around a forward and clears it; outside of one, a call to the registered function is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from splitserve.engine.attention.base import LayerAttention
from splitserve.engine.attention.native_backend import NativePlan
from splitserve.kv.storage import LayerView

ATTENTION_NAME = "splitserve"


class AttentionHandler(Protocol):
    """Answers one attention layer's call in a forward of one flat row of tokens."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """`query [1, Hq, T, Dk]`, `key [1, H, T, Dk]`, `value [1, H, T, Dv]` (after RoPE) -> `[1, T, Hq, Dv]`."""
        ...


class FusedStep(Protocol):
    """What a fused layer asks of the current forward."""

    @property
    def places(self) -> NativePlan: ...
    def view(self, layer: LayerAttention) -> LayerView: ...


_local = threading.local()


@contextmanager
def attention_context(handler: AttentionHandler) -> Generator[None]:
    """Let `handler` answer all attention calls that this thread makes inside the block."""
    previous = getattr(_local, "handler", None)
    _local.handler = handler
    try:
        yield
    finally:
        _local.handler = previous


def current_step() -> FusedStep:
    """Of the forward that this thread is in. RuntimeError outside of `attention_context`."""
    return _current()


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls under the name "splitserve". RuntimeError outside of `attention_context`."""
    return _current().attend(module, query, key, value, attention_mask, options), None


def _current() -> Any:
    handler = getattr(_local, "handler", None)
    if handler is None:
        raise RuntimeError("attention was called outside of a step of the engine")
    return handler


def register_attention() -> None:
    """Make `attn_implementation="splitserve"` known to transformers. No mask function of that name: masks stay None."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, paged_attention)
