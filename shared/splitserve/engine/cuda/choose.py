"""Which attention serves on a GPU: of what is installed, the first that takes all layers and shows to be right there."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from splitserve.engine.attention.base import AttentionBackend, LayerAttention
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.attention.trial import refuse_wrong
from splitserve.engine.cuda.flash_attn_backend import FlashAttnBackend
from splitserve.engine.cuda.flashinfer_backend import FlashInferBackend
from splitserve.engine.cuda.phased import PhasedBackend
from splitserve.engine.cuda.triton_backend import TritonBackend

logger = logging.getLogger("splitserve.engine")


@dataclass(frozen=True, slots=True)
class Setting:
    """What backends are made for."""

    block_tokens: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that may be there: `package` is imported, and given to `make`."""

    package: str
    make: Callable[[Any, Setting], AttentionBackend[Any]]


def _flashinfer(package: Any, at: Setting) -> AttentionBackend[Any]:
    return FlashInferBackend(package, at.block_tokens, at.device, at.dtype)


def _flash_attn(package: Any, at: Setting) -> AttentionBackend[Any]:
    return FlashAttnBackend(package, at.block_tokens, at.device, at.dtype)


def _triton(package: Any, at: Setting) -> AttentionBackend[Any]:
    units = torch.cuda.get_device_properties(at.device).multi_processor_count
    return TritonBackend(at.block_tokens, at.device, units)


FLASHINFER = Candidate("flashinfer", _flashinfer)
DECODES = (FLASHINFER, Candidate("triton", _triton))  # those that can be captured in a graph; best first
CHUNKS = (FLASHINFER, Candidate("flash_attn", _flash_attn))


def choose(
    layers: Iterable[LayerAttention],
    at: Setting,
    decodes: Iterable[Candidate] = DECODES,
    chunks: Iterable[Candidate] = CHUNKS,
) -> PhasedBackend | None:
    """None where nothing better than the torch backend is there; each refusal is a log line."""
    layers = tuple(layers)
    torch_backend = TorchBackend(at.block_tokens, at.device)
    decode = _first(decodes, lambda backend: PhasedBackend(backend, torch_backend), layers, at)
    chunk = _first(chunks, lambda backend: PhasedBackend(torch_backend, backend), layers, at)
    if decode is None and chunk is None:
        return None
    return PhasedBackend(decode or torch_backend, chunk or torch_backend)


def _first(
    candidates: Iterable[Candidate],
    trial: Callable[[AttentionBackend[Any]], PhasedBackend],
    layers: tuple[LayerAttention, ...],
    at: Setting,
) -> AttentionBackend[Any] | None:
    for candidate in candidates:
        if importlib.util.find_spec(candidate.package) is None:
            logger.info("attention candidate is not installed", extra={"candidate": candidate.package})
            continue
        try:
            backend = candidate.make(importlib.import_module(candidate.package), at)
            refusal = refuse_wrong(trial(backend), layers, at.block_tokens, at.dtype, at.device)
        except Exception:  # a package of another CUDA, a compiler that is missing, a kernel too large for this GPU
            logger.exception("attention candidate failed its trial", extra={"candidate": candidate.package})
            continue
        if refusal is None:
            return backend
        logger.info("attention candidate refused", extra={"candidate": candidate.package, "reason": refusal})
    return None
