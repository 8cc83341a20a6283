"""What a worker's page tells of its model and KV cache once, at start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from splitserve.config import EngineSettings
from splitserve.engine.loader import LoadedModel
from splitserve.kv.layout import ITEM_BYTES
from splitserve.telemetry.vllm import CACHE_CONFIG_LABELS
from splitserve.worker.estimates import LayerSizes, ModelSizes

_GATED_WIDTH = 4  # times the hidden size, where a config does not say


def sizes_of(loaded: LoadedModel) -> ModelSizes:
    """Sizes out of the model's config and its measured layers. A layer that reads another's KV has none of its own."""
    config: Any = loaded.config
    hidden = int(config.hidden_size)
    return ModelSizes(
        hidden=hidden,
        feed_forward=_feed_forward(config, hidden),
        vocabulary=loaded.vocab_size,
        layers=tuple(
            LayerSizes(
                layer.heads * layer.k_dim, layer.kv_heads * (layer.k_dim + layer.v_dim) if layer.source is None else 0
            )
            for layer in loaded.layers.values()
        ),
        item_bytes=ITEM_BYTES[loaded.dtype],
    )


def _feed_forward(config: Any, hidden: int) -> int:
    """Width of what a token goes through: that of its experts together, where there are any."""
    width = int(getattr(config, "intermediate_size", 0) or _GATED_WIDTH * hidden)
    chosen = int(getattr(config, "num_experts_per_tok", 0) or 0)
    return chosen * int(getattr(config, "moe_intermediate_size", 0) or width) if chosen else width


def cache_config(loaded: LoadedModel, settings: EngineSettings, blocks: int, max_model_len: int) -> Mapping[str, str]:
    """Labels of `vllm:cache_config_info`, all of vLLM's; "None" for what this engine does not have, as vLLM writes it."""
    layout = loaded.layout
    tokens = layout.block_tokens
    known = {
        "_block_size_resolved": True,
        "block_size": tokens,
        "cache_dtype": loaded.dtype,
        "cache_hit_alignment_tokens": tokens,
        "effective_attention_block_size": tokens,
        "enable_mamba_shared_prefix_checkpoint": False,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "hash_block_size": tokens,
        "is_attention_free": False,
        "kv_cache_layout": layout.packing,
        "kv_cache_max_concurrency": round(blocks * tokens / max_model_len, 2),
        "kv_cache_memory_bytes": blocks * layout.block_bytes,
        "kv_cache_size_tokens": blocks * tokens,
        "kv_sharing_fast_prefill": False,
        "num_cpu_blocks": 0,
        "num_gpu_blocks": blocks,
        "prefix_caching_hash_algo": "sha256",
        "prefix_match_unit": "block",
        "swa_bounded_replay": False,
        "use_kda_recoverssm": False,
        "use_replayssm": False,
        "user_specified_block_size": "block_size" in settings.model_fields_set,
    }
    return {label: str(known.get(label)) for label in CACHE_CONFIG_LABELS}
