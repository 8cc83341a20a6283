"""The way from torch operators to the compiled kernels, for one loaded model on a CPU: built, tried, then put to use.

First attention, tried layer shape by layer shape; then, where the model's layers are known, those as calls of the library,
tried by the model's logits against float32. Until then, and for whatever is refused, torch serves.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from splitserve.engine.attention.chosen import ChosenBackend
from splitserve.engine.attention.native_backend import NativeBackend
from splitserve.engine.attention.trial import refuse_wrong
from splitserve.engine.exact import Exact
from splitserve.engine.fused import Fusion, fusing_refusal
from splitserve.engine.native import library
from splitserve.engine.probe import Layers
from splitserve.errors import DependencyMissing
from splitserve.kv.layout import KVLayout

_log = logging.getLogger("splitserve.engine")

FUSED_BOUND = 0.1  # of the logits' spread, at the median position; torch in bfloat16 is off by 0.04 to 0.06


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """`cache`: the user's cache folder. `exact`: of `model`; None leaves its layers as they are."""

    chosen: ChosenBackend
    model: PreTrainedModel
    layers: Layers
    layout: KVLayout
    cache: Path
    exact: Exact | None = None

    def refusal(self) -> str | None:
        """What rules the kernels out whatever is built, in one clause."""
        reasons = (self._backend.supports(layer) for layer in self.layers.values())
        return next((reason for reason in reasons if reason), None) or library.refusal()

    def use_if_built(self) -> bool:
        """Take the library that an earlier start has built; milliseconds, and a second or two for the model's layers."""
        path = library.library_path(self.cache)
        return path.exists() and self._try(path)

    def build(self) -> bool:
        """Compile, load, try, promote; blocks for seconds to minutes. Failing is a log line: torch goes on serving."""
        try:
            path = library.build(self.cache)
        except DependencyMissing as error:
            return self._stay("attention", error.message)
        return self._try(path)

    def build_in_background(self) -> None:
        """`build` in a thread that does not hold the process up when it wants to end."""
        threading.Thread(target=self.build, name="splitserve-kernels", daemon=True).start()

    @property
    def _backend(self) -> NativeBackend:
        return NativeBackend(self.layout.block_tokens, self.model.dtype)

    def _try(self, path: Path) -> bool:
        try:
            library.load(path)
        except DependencyMissing as error:
            return self._stay("attention", error.message)
        backend = self._backend
        wrong = refuse_wrong(backend, self.layers.values(), self.layout.block_tokens, self.model.dtype)
        if wrong is not None:
            return self._stay("attention", wrong)
        self.chosen.promote(backend)
        _log.info("attention by the compiled kernels from here on", extra={"library": path.name})
        self._fuse(backend)
        return True

    def _fuse(self, backend: NativeBackend) -> bool:
        refusal = fusing_refusal(self.model, self.layers)
        if refusal is not None or self.exact is None:
            return self._stay("the layers", refusal or "their logits in float32 are not known")
        fusion = Fusion.of(self.model, self.layers)
        error = self.exact.error(fusion.tried_on(self.model), self.layers, backend, self.layout)
        if not error <= FUSED_BOUND:  # a NaN must not pass
            return self._stay(
                "the layers", f"logits are off by {error:.2g} of their spread, the bound is {FUSED_BOUND:g}"
            )
        fusion.put_into(self.model)
        _log.info(
            "the layers are the kernels' from here on", extra={"calls": len(fusion.runs), "error": round(error, 4)}
        )
        return True

    def _stay(self, what: str, reason: str) -> bool:
        _log.info(f"{what} stay with torch", extra={"reason": reason})
        return False
