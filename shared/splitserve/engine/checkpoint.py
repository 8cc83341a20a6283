"""Reading a checkpoint folder: config, weights, the ids that end an answer. Every failure is one line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from splitserve.engine.context import ATTENTION_NAME, register_attention
from splitserve.engine.devices import free_memory, made_for_bfloat16
from splitserve.engine.trial import bfloat16_is_faster
from splitserve.errors import ConfigError, ModelUnavailable, NotEnoughMemory, UnsupportedModel
from splitserve.kv.layout import ITEM_BYTES
from splitserve.kv.storage import DTYPES

_log = logging.getLogger("splitserve.engine")

_DEFAULT_CONTEXT = 2048  # for a model that names no limit of its own


def read_config(name: str, folder: Path) -> PretrainedConfig:
    """Raises ModelUnavailable without a config.json, UnsupportedModel for an architecture that transformers lacks."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if not (folder / "config.json").is_file():
            raise ModelUnavailable(f"{name}: {folder} has no config.json") from error
        raise UnsupportedModel(f"{name} cannot be served: {_first_line(error)}") from error


def context_length(name: str, config: PretrainedConfig, wanted: int) -> int:
    """`wanted` tokens, or the model's own limit. Raises ConfigError for more than the model can take."""
    own = getattr(config, "max_position_embeddings", None) or wanted or _DEFAULT_CONTEXT
    if wanted > own:
        raise ConfigError(f"--max-model-len {wanted} is more than {name} can take ({own} tokens)")
    return wanted or own


def choose_dtype(name: str, config: PretrainedConfig, wanted: str, device: torch.device, cache: Path) -> str:
    """auto: the checkpoint's, but on a CPU only what it is fast in. Raises UnsupportedModel for 8-bit and such.

    `cache`: where the outcome of a trial is kept.
    """
    own = _stored_dtype(config)
    dtype = own if wanted == "auto" else wanted
    if wanted == "auto" and device.type == "cpu" and _slow(dtype, device, cache):
        _log.info(
            "computing in float32: this CPU is slow in the checkpoint's format", extra={"model": name, "dtype": own}
        )
        dtype = "float32"
    if dtype not in ITEM_BYTES:
        raise UnsupportedModel(f"{name} cannot be served: its weights are {dtype}; choose one with --dtype")
    return dtype


def _slow(dtype: str, device: torch.device, cache: Path) -> bool:
    return dtype == "float16" or (
        dtype == "bfloat16" and not made_for_bfloat16(device) and not bfloat16_is_faster(cache)
    )


def checkpoint_bytes(folder: Path, config: PretrainedConfig, dtype: str) -> int:
    """Bytes of the weights in `dtype`, from the files' sizes."""
    stored = _stored_dtype(config)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return size * ITEM_BYTES[dtype] // ITEM_BYTES.get(stored, ITEM_BYTES[dtype])


def check_memory(name: str, folder: Path, config: PretrainedConfig, dtype: str, device: torch.device) -> None:
    """Raises NotEnoughMemory, with both numbers, before anything is read."""
    need, free = checkpoint_bytes(folder, config, dtype), free_memory(device)
    if need > free:
        raise NotEnoughMemory(f"the weights of {name} need {need} bytes in {dtype}, {free} are free on {device}")


def read_weights(
    name: str, folder: Path, config: PretrainedConfig, dtype: str, device: torch.device
) -> PreTrainedModel:
    """The model, its attention ours. Raises ModelUnavailable for broken or incomplete weights, or UnsupportedModel."""
    register_attention()
    disable_progress_bar()
    try:
        loaded, info = _from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ModelUnavailable(f"the weights of {name} cannot be read: {_first_line(error)}") from error
    except KeyError as error:
        cause = (
            "it does not use transformers' attention interface" if ATTENTION_NAME in str(error) else _first_line(error)
        )
        raise UnsupportedModel(f"{name} cannot be served: {cause}") from error
    except (ValueError, ImportError, RuntimeError) as error:
        raise UnsupportedModel(f"{name} cannot be served: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelUnavailable(f"{name} lacks {len(missing)} of its weights, the first is {missing[0]}")
    loaded.eval().requires_grad_(False)
    torch.nn.Module.to(loaded, device=device)
    return loaded


def eos_ids(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """All ids that end an answer: generation_config's, else the config's."""
    ids: int | Sequence[int] | None = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id or ids
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _from_pretrained(folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    return AutoModelForCausalLM.from_pretrained(folder, **options)  # pyright: ignore  # it gives a pair with loading info


def _stored_dtype(config: PretrainedConfig) -> str:
    return "float32" if config.dtype is None else str(config.dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
