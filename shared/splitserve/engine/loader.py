"""From a model folder to a model that can be served: read, gated, packed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from splitserve.config import EngineSettings, ModelSettings
from splitserve.engine.attention.base import AttentionBackend
from splitserve.engine.attention.torch_backend import TorchBackend
from splitserve.engine.context import ATTENTION_NAME, register_attention
from splitserve.engine.devices import fast_bfloat16, free_memory, pick_device
from splitserve.engine.gate import check_config, rope_parameters
from splitserve.engine.linear import pack_linears
from splitserve.engine.probe import Layers, probe
from splitserve.engine.rope import pin_longrope
from splitserve.engine.selfcheck import check_against_reference
from splitserve.errors import ConfigError, ModelUnavailable, NotEnoughMemory, UnsupportedModel
from splitserve.kv.fingerprint import Factors, fingerprint, fingerprint_factors, weights_digest
from splitserve.kv.layout import ITEM_BYTES, KVLayout, LayerKV, attention_layout
from splitserve.kv.storage import DTYPES

_log = logging.getLogger("splitserve.engine")

_GIB = 1 << 30
_DEFAULT_CONTEXT = 2048  # for a model that names no limit of its own


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model that passed the gate. `fingerprint` is that of its KV."""

    name: str
    model: PreTrainedModel
    config: PretrainedConfig
    layers: Layers
    backend: AttentionBackend[Any]
    layout: KVLayout
    fingerprint: str
    fingerprint_factors: Factors
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_model_len: int
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
    config = _read_config(name, folder)
    max_model_len = _max_model_len(name, config, model.max_model_len)
    check_config(name, config, max_model_len)
    dtype = _dtype(name, config, model.dtype, device)
    _check_memory(name, folder, config, dtype, device)
    loaded = _read_weights(name, folder, config, dtype, device)
    pin_longrope(loaded, max_model_len)
    backend = TorchBackend(engine.block_size, device)
    layers = probe(name, loaded, backend)
    layout = kv_layout(layers, engine.block_size, dtype)
    packed = pack_linears(loaded, DTYPES[dtype]) if device.type == "cpu" else 0
    error = check_against_reference(name, loaded, layers, backend, layout)
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
        layout=layout,
        fingerprint=fingerprint(factors),
        fingerprint_factors=factors,
        eos_ids=_eos_ids(folder, config),
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        dtype=dtype,
        device=device,
        weight_bytes=_checkpoint_bytes(folder, config, dtype),
    )


def pool_blocks(
    loaded: LoadedModel, settings: EngineSettings, workers_on_device: int = 1, free: int | None = None
) -> int:
    """Blocks of one worker's KV pool. `free` is the device's free memory in bytes, asked for when None.

    On a CPU 1 GiB unless told, less where that is over a quarter of what is free; on a GPU this worker's share of
    `gpu_memory_utilization` that the weights leave. NotEnoughMemory if not even a short request would fit.
    """
    free = free_memory(loaded.device) if free is None else free
    wanted = settings.kv_cache_memory_bytes
    if wanted:
        size = wanted
        if size > free:
            raise NotEnoughMemory(f"--kv-cache-memory-bytes asks for {size} bytes, {free} are free")
    elif loaded.device.type == "cuda":
        total = torch.cuda.mem_get_info(loaded.device)[1]
        size = min(free, int(total * settings.gpu_memory_utilization / workers_on_device) - loaded.weight_bytes)
    else:
        size = min(_GIB, free // 4)
    block_bytes = loaded.layout.block_bytes
    least = -(-min(loaded.max_model_len, 256) // settings.block_size) + 1
    if size < least * block_bytes:
        raise NotEnoughMemory(
            f"the KV pool of {loaded.name} would get {max(size, 0)} bytes, it needs {least * block_bytes} at least "
            f"({loaded.layout.bytes_per_token} a token); give it more with --kv-cache-memory-bytes"
        )
    return size // block_bytes


def context_limit(loaded: LoadedModel, blocks: int, wanted: int) -> int:
    """Longest prompt plus answer that a pool of `blocks` can hold: `max_model_len`, cut to the pool unless it was asked for.

    NotEnoughMemory if `wanted` (`--max-model-len`, 0 = not given) is more than the pool holds.
    """
    room = blocks * loaded.layout.block_tokens
    if loaded.max_model_len <= room:
        return loaded.max_model_len
    if wanted:
        need = wanted * loaded.layout.bytes_per_token
        raise NotEnoughMemory(
            f"--max-model-len {wanted} needs a KV pool of {need} bytes, the pool has {blocks * loaded.layout.block_bytes}; "
            "lower it, or raise --kv-cache-memory-bytes"
        )
    _log.warning(
        "the KV pool is smaller than the model's context", extra={"context": loaded.max_model_len, "served": room}
    )
    return room


def kv_layout(layers: Layers, block_tokens: int, dtype: str) -> KVLayout:
    """One attention group of all layers that have KV of their own."""
    own = sorted((layer for layer in layers.values() if layer.source is None), key=lambda layer: layer.layer)
    shapes = [LayerKV(layer.layer, layer.kv_heads, layer.k_dim, layer.v_dim, dtype) for layer in own]
    return attention_layout(block_tokens, shapes)


def _read_config(name: str, folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if not (folder / "config.json").is_file():
            raise ModelUnavailable(f"{name}: {folder} has no config.json") from error
        raise UnsupportedModel(f"{name} cannot be served: {_first_line(error)}") from error


def _max_model_len(name: str, config: PretrainedConfig, wanted: int) -> int:
    own = getattr(config, "max_position_embeddings", None) or wanted or _DEFAULT_CONTEXT
    if wanted > own:
        raise ConfigError(f"--max-model-len {wanted} is more than {name} can take ({own} tokens)")
    return wanted or own


def _longrope(config: PretrainedConfig) -> bool:
    return any(parameters.get("rope_type") == "longrope" for parameters in rope_parameters(config))


def _dtype(name: str, config: PretrainedConfig, wanted: str, device: torch.device) -> str:
    own = str(config.dtype).removeprefix("torch.") if config.dtype is not None else "float32"
    dtype = own if wanted == "auto" else wanted
    if wanted == "auto" and device.type == "cpu" and (dtype == "float16" or dtype == "bfloat16" and not fast_bfloat16(device)):
        _log.info("computing in float32: this CPU is slow in the checkpoint's format", extra={"model": name, "dtype": own})
        dtype = "float32"
    if dtype not in ITEM_BYTES:
        raise UnsupportedModel(f"{name} cannot be served: its weights are {dtype}; choose one with --dtype")
    return dtype


def _checkpoint_bytes(folder: Path, config: PretrainedConfig, dtype: str) -> int:
    """Bytes of the weights in `dtype`, from the files' sizes."""
    stored = str(config.dtype).removeprefix("torch.")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return size * ITEM_BYTES[dtype] // ITEM_BYTES.get(stored, ITEM_BYTES[dtype])


def _check_memory(name: str, folder: Path, config: PretrainedConfig, dtype: str, device: torch.device) -> None:
    need, free = _checkpoint_bytes(folder, config, dtype), free_memory(device)
    if need > free:
        raise NotEnoughMemory(f"the weights of {name} need {need} bytes in {dtype}, {free} are free on {device}")


def _read_weights(
    name: str, folder: Path, config: PretrainedConfig, dtype: str, device: torch.device
) -> PreTrainedModel:
    register_attention()
    disable_progress_bar()
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as error:
        raise ModelUnavailable(f"the weights of {name} cannot be read: {_first_line(error)}") from error
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UnsupportedModel(f"{name} cannot be served: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelUnavailable(f"{name} lacks {len(missing)} of its weights, the first is {missing[0]}")
    loaded.eval().requires_grad_(False)
    return loaded if device.type == "cpu" else loaded.to(device)


def _eos_ids(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """All ids that end an answer: generation_config's, else the config's."""
    ids: int | Sequence[int] | None = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id or ids
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
