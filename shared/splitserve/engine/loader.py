"""From a model folder to a model that can be served: read, gated, packed."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from splitserve.config import EngineSettings, ModelSettings
from splitserve.engine.attention.chosen import ChosenBackend
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.checkpoint import (
    check_memory,
    checkpoint_bytes,
    choose_dtype,
    context_length,
    eos_ids,
    read_config,
    read_weights,
)
from splitserve.engine.cuda.choose import Setting, choose
from splitserve.engine.devices import free_memory, pick_device
from splitserve.engine.exact import exact_logits
from splitserve.engine.fused import fusing_refusal
from splitserve.engine.gate import check_config, rope_parameters
from splitserve.engine.kernels import Kernels
from splitserve.engine.linear import pack_linears
from splitserve.engine.probe import Layers, probe
from splitserve.engine.rope import pin_longrope
from splitserve.engine.selfcheck import check_against_reference
from splitserve.errors import ConfigError, NotEnoughMemory
from splitserve.kv.fingerprint import Factors, fingerprint, fingerprint_factors, weights_digest
from splitserve.kv.layout import KVLayout, LayerKV, attention_layout
from splitserve.kv.storage import DTYPES
from splitserve.model.resolve import cache_folder

_log = logging.getLogger("splitserve.engine")

_DEFAULT_POOL = 1 << 30  # bytes, on a CPU
_LEAST_CONTEXT = 256  # tokens: a pool that cannot hold this much is of no use


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model that passed the gate. `fingerprint` is that of its KV."""

    name: str
    model: PreTrainedModel
    config: PretrainedConfig
    layers: Layers
    backend: ChosenBackend
    kernels: Kernels | None  # still to be built; `build_in_background` when the worker serves
    layout: KVLayout
    fingerprint: str
    fingerprint_factors: Factors
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int
    context_asked: bool  # max_model_len was given, so a pool that cannot hold it is an error
    dtype: str
    device: torch.device
    weight_bytes: int


def load_model(folder: Path, *, model: ModelSettings, engine: EngineSettings) -> LoadedModel:
    """Load and gate the model in `folder` (config.json, *.safetensors). Blocks for seconds.

    Raises ConfigError (device, max_model_len), ModelUnavailable (a folder that cannot be read), NotEnoughMemory and
    UnsupportedModel, each one line.
    """
    started = time.perf_counter()
    name = model.model or folder.name
    device = pick_device(engine.device)
    if engine.threads:
        torch.set_num_threads(engine.threads)
    config = read_config(name, folder)
    max_model_len = context_length(name, config, model.max_model_len)
    check_config(name, config, max_model_len)
    dtype = choose_dtype(name, config, model.dtype, device, cache_folder(model))
    check_memory(name, folder, config, dtype, device)
    loaded = read_weights(name, folder, config, dtype, device)
    pin_longrope(loaded, max_model_len)
    backend = ChosenBackend(TorchBackend(engine.block_size, device))
    layers = probe(name, loaded, backend)
    layout = kv_layout(layers, engine.block_size, dtype)
    if device.type == "cuda" and engine.attention_backend == "auto":
        backend.promote(choose(layers.values(), Setting(engine.block_size, device, DTYPES[dtype])) or backend.current)
    kernels = Kernels(backend, loaded, layers, layout, cache_folder(model))
    refusal = _kernels_refusal(kernels, engine, device)
    if refusal is None and fusing_refusal(loaded, layers) is None:
        kernels = replace(kernels, exact=exact_logits(loaded, layers, max_model_len))
    packed = pack_linears(loaded, DTYPES[dtype]) if device.type == "cpu" else 0
    error = check_against_reference(name, loaded, layers, backend, layout, max_model_len)
    to_build = _put_to_use(kernels, refusal, engine)
    architecture = type(loaded).__name__
    factors = fingerprint_factors(
        model=architecture,
        weights=weights_digest(folder),
        dtype=dtype,
        layout=layout,
        rope=[dict(parameters) for parameters in rope_parameters(config)] + [max_model_len if _longrope(config) else 0],
    )
    _log.info(
        "model loaded",
        extra={
            "model": name,
            "architecture": architecture,
            "dtype": dtype,
            "device": str(device),
            "kv_bytes_per_token": layout.bytes_per_token,
            "packed_linears": packed,
            "attention": backend.name,
            "self_check_error": round(error, 6),
            "seconds": round(time.perf_counter() - started, 2),
        },
    )
    return LoadedModel(
        name=name,
        model=loaded,
        config=config,
        layers=layers,
        backend=backend,
        kernels=to_build,
        layout=layout,
        fingerprint=fingerprint(factors),
        fingerprint_factors=factors,
        eos_ids=eos_ids(folder, config),
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        context_asked=model.max_model_len > 0,
        dtype=dtype,
        device=device,
        weight_bytes=checkpoint_bytes(folder, config, dtype),
    )


def _kernels_refusal(kernels: Kernels, engine: EngineSettings, device: torch.device) -> str | None:
    """Why torch alone serves, in one clause; None: the kernels may."""
    if engine.attention_backend == "torch":
        return "--attention-backend is torch"
    return "the compiled kernels are for a CPU" if device.type != "cpu" else kernels.refusal()


def _put_to_use(kernels: Kernels, refusal: str | None, engine: EngineSettings) -> Kernels | None:
    """Put compiled kernels in where they are built already, or asked for; what remains to be built, or None.

    ConfigError when they were asked for and cannot be had.
    """
    if engine.attention_backend == "native":
        if refusal is not None or not kernels.build():
            raise ConfigError(f"--attention-backend native: {refusal or 'see the line above'}; use auto")
        return None
    if refusal is not None:
        _log.info("no compiled kernels", extra={"reason": refusal})
        return None
    return None if kernels.use_if_built() else kernels


def pool_blocks(
    loaded: LoadedModel, settings: EngineSettings, workers_on_device: int = 1, free: int | None = None
) -> int:
    """Blocks of one worker's KV pool. `free` is the device's free memory in bytes, asked for when None.

    On a CPU 1 GiB unless told, less where that is over a quarter of what is free; on a GPU this worker's share of
    `gpu_memory_utilization` that the weights leave, but not the last tenth of what is free: a step needs room as well. NotEnoughMemory if a `--max-model-len` that was given, or else a short
    request, would not fit.
    """
    free = free_memory(loaded.device) if free is None else free
    wanted = settings.kv_cache_memory_bytes
    if wanted:
        size = wanted
        if size > free:
            raise NotEnoughMemory(f"--kv-cache-memory-bytes asks for {size} bytes, {free} are free")
    elif loaded.device.type == "cuda":
        total = torch.cuda.mem_get_info(loaded.device)[1]
        size = min(
            free * 9 // 10, int(total * settings.gpu_memory_utilization / workers_on_device) - loaded.weight_bytes
        )
    else:
        size = min(_DEFAULT_POOL, free // 4)
    block_bytes = loaded.layout.block_bytes
    context = loaded.max_model_len if loaded.context_asked else min(loaded.max_model_len, _LEAST_CONTEXT)
    least = -(-context // settings.block_size) + 1
    if size < least * block_bytes:
        raise NotEnoughMemory(
            f"the KV pool of {loaded.name} would get {max(size, 0)} bytes, {context} tokens need {least * block_bytes}; "
            "give it more with --kv-cache-memory-bytes, or lower --max-model-len"
        )
    return size // block_bytes


def served_context(loaded: LoadedModel, blocks: int) -> int:
    """Longest prompt plus answer that a pool of `blocks` serves: the model's, or the pool's own size where that is less."""
    room = blocks * loaded.layout.block_tokens
    if loaded.max_model_len > room:
        _log.warning(
            "the KV pool is smaller than the model's context",
            extra={"model": loaded.name, "context": loaded.max_model_len, "served": room},
        )
    return min(loaded.max_model_len, room)


def kv_layout(layers: Layers, block_tokens: int, dtype: str) -> KVLayout:
    """One attention group of all layers that have KV of their own."""
    own = sorted((layer for layer in layers.values() if layer.source is None), key=lambda layer: layer.layer)
    shapes = [LayerKV(layer.layer, layer.kv_heads, layer.k_dim, layer.v_dim, dtype) for layer in own]
    return attention_layout(block_tokens, shapes)


def _longrope(config: PretrainedConfig) -> bool:
    return any(parameters.get("rope_type") == "longrope" for parameters in rope_parameters(config))
