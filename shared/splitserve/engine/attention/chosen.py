"""Which backend serves: the reference at once, the kernels from the step after they are there and have shown to be right."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from splitserve.engine.attention.base import AttentionBackend, ForwardContext, LayerAttention
from splitserve.engine.attention.native import library
from splitserve.engine.attention.native_backend import NativeBackend
from splitserve.engine.attention.trial import refuse_wrong
from splitserve.errors import DependencyMissing
from splitserve.kv.storage import LayerView

_log = logging.getLogger("splitserve.engine")


@dataclass(frozen=True, slots=True)
class ChosenPlan:
    """A step stays with the backend that planned it."""

    backend: AttentionBackend[Any]
    plan: object


class ChosenBackend(AttentionBackend[ChosenPlan]):
    """`reference` until `promote`. Both read and write the same pool, so they change between any two steps."""

    def __init__(self, reference: AttentionBackend[Any]) -> None:
        self._current = reference

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only, and it changes
        return self._current.name

    def promote(self, backend: AttentionBackend[Any]) -> None:
        """From the next step on. Any thread may call it."""
        self._current = backend

    def supports(self, layer: LayerAttention) -> str | None:
        return self._current.supports(layer)

    def plan(self, context: ForwardContext) -> ChosenPlan:
        backend = self._current
        return ChosenPlan(backend, backend.plan(context))

    def forward(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        view: LayerView,
        plan: ChosenPlan,
    ) -> torch.Tensor:
        return plan.backend.forward(layer, query, key, value, view, plan.plan)


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """The way from the torch backend to the kernels, for one loaded model on a CPU. `cache`: the user's cache folder."""

    chosen: ChosenBackend
    layers: Sequence[LayerAttention]
    block_tokens: int
    dtype: torch.dtype
    cache: Path

    def refusal(self) -> str | None:
        """What rules the kernels out whatever is built, in one clause."""
        backend = NativeBackend(self.block_tokens, self.dtype)
        reasons = (backend.supports(layer) for layer in self.layers)
        return next((reason for reason in reasons if reason), None) or library.refusal()

    def use_if_built(self) -> bool:
        """Take the library that an earlier start has built; milliseconds."""
        path = library.library_path(self.cache)
        return path.exists() and self._try(path)

    def build(self) -> bool:
        """Compile, load, try, promote; blocks for seconds to minutes. Failing is a log line: torch goes on serving."""
        try:
            path = library.build(self.cache)
        except DependencyMissing as error:
            return self._stay(error.message)
        return self._try(path)

    def build_in_background(self) -> None:
        """`build` in a thread that does not hold the process up when it wants to end."""
        threading.Thread(target=self.build, name="splitserve-kernels", daemon=True).start()

    def _try(self, path: Path) -> bool:
        try:
            library.load(path)
        except DependencyMissing as error:
            return self._stay(error.message)
        backend = NativeBackend(self.block_tokens, self.dtype)
        wrong = refuse_wrong(backend, self.layers, self.block_tokens, self.dtype)
        if wrong is not None:
            return self._stay(wrong)
        self.chosen.promote(backend)
        _log.info("attention by the compiled kernels from here on", extra={"library": path.name})
        return True

    def _stay(self, reason: str) -> bool:
        _log.info("attention stays with torch", extra={"reason": reason})
        return False
