"""Tiny models with random weights: one of each architecture that the load gate admits, and of those that it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 96
CONTEXT = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_MLA: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED_KV: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": _ALTERNATING,
    "sliding_window": 9,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 6, "long_factor": [3.0] * 6,
}  # fmt: skip


def _with(kind: Callable[..., PretrainedConfig], **changes: Any) -> Callable[[], PretrainedConfig]:
    values = {**_COMMON, **changes}
    return lambda: kind(**{name: value for name, value in values.items() if value is not None})


def _gpt2() -> PretrainedConfig:
    return tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )


def _opt() -> PretrainedConfig:
    return tf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=48, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, word_embed_proj_dim=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


ADMITTED: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _with(tf.LlamaConfig),
    "llama tied": _with(tf.LlamaConfig, tie_word_embeddings=True),
    "qwen2": _with(tf.Qwen2Config),
    "qwen3": _with(tf.Qwen3Config),
    "mistral, window 9": _with(tf.MistralConfig, sliding_window=9),
    "gemma2, window 9": _with(tf.Gemma2Config, num_hidden_layers=4, sliding_window=9, layer_types=_ALTERNATING),
    "gemma3, window 9": _with(tf.Gemma3TextConfig, num_hidden_layers=4, sliding_window=9, layer_types=_ALTERNATING),
    "gpt2": _gpt2,
    "gpt_oss, window 9": _with(
        tf.GptOssConfig, num_hidden_layers=4, sliding_window=9, layer_types=_ALTERNATING, num_local_experts=4,
        num_experts_per_tok=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gpt_neox": _with(tf.GPTNeoXConfig, head_dim=None, num_key_value_heads=None),
    "opt": _opt,
    "cohere2, window 9": _with(tf.Cohere2Config, num_hidden_layers=4, sliding_window=9, layer_types=_ALTERNATING),
    "deepseek_v3": _with(tf.DeepseekV3Config, **_MLA),
    "stablelm": _with(tf.StableLmConfig, head_dim=None, hidden_size=64),
    "qwen2_moe": _with(tf.Qwen2MoeConfig, **_MOE, shared_expert_intermediate_size=32),
    "qwen3_moe": _with(tf.Qwen3MoeConfig, **_MOE),
    "phimoe": _with(tf.PhimoeConfig, num_local_experts=4, num_experts_per_tok=2, head_dim=None),
    "phi3": _with(tf.Phi3Config, head_dim=None),
    "olmo2": _with(tf.Olmo2Config, head_dim=None),
    "granite": _with(tf.GraniteConfig, head_dim=None, logits_scaling=2.0, attention_multiplier=0.2),
    "smollm3": _with(tf.SmolLM3Config, head_dim=None, no_rope_layers=[1, 0]),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4),
    "olmo3, window 9": _with(
        tf.Olmo3Config, head_dim=None, num_hidden_layers=4, sliding_window=9, layer_types=_ALTERNATING
    ),
    "gemma3n, shared KV, window 9": _with(
        tf.Gemma3nTextConfig, **_SHARED_KV, laurel_rank=8, intermediate_size=[64] * 4, activation_sparsity_pattern=None
    ),
    "gemma4, shared KV, window 9": _with(tf.Gemma4TextConfig, **_SHARED_KV, global_head_dim=24),
    "llama3 rope": _with(
        tf.LlamaConfig,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}  # fmt: skip

_IN_TILES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
# Of the families whose layers can be one call, in sizes that the kernels take
FUSABLE: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _with(tf.LlamaConfig, **_IN_TILES),
    "llama with biases": _with(tf.LlamaConfig, **_IN_TILES, attention_bias=True),
    "llama tied": _with(tf.LlamaConfig, **_IN_TILES, tie_word_embeddings=True),
    "mistral, window 9": _with(tf.MistralConfig, **_IN_TILES, sliding_window=9),
    "qwen2": _with(tf.Qwen2Config, **_IN_TILES),
    "qwen3": _with(tf.Qwen3Config, **_IN_TILES),
    "gemma3, window 9": _with(
        tf.Gemma3TextConfig, **_IN_TILES, num_hidden_layers=4, sliding_window=9, layer_types=_ALTERNATING
    ),
}


REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "t5": (
        lambda: tf.T5Config(vocab_size=VOCABULARY, d_model=32, num_layers=1, d_ff=32),
        "it is an encoder-decoder model",
    ),
    "gemma3 with images": (
        tf.Gemma3Config,
        "it is a multimodal model (text_config, vision_config); only text models are served",
    ),
    "quantised": (
        _with(tf.LlamaConfig, quantization_config={"quant_method": "gptq", "bits": 4}),
        "its weights are quantised (gptq); use a checkpoint in float32, bfloat16 or float16",
    ),
    "qwen3_next": (
        _with(tf.Qwen3NextConfig, **_MOE, layer_types=["linear_attention", "full_attention"]),
        "it has layers of type linear_attention; only full and sliding attention are served",
    ),
    "jamba": (
        _with(tf.JambaConfig, head_dim=None, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
        "it has layers of type linear_attention; only full and sliding attention are served",
    ),
    "llama4": (
        _with(tf.Llama4TextConfig, num_local_experts=2, attention_chunk_size=16, intermediate_size_mlp=64),
        "it has layers of type chunked_attention; only full and sliding attention are served",
    ),
    "dynamic rope": (
        _with(tf.LlamaConfig, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "its RoPE is 'dynamic', which changes with the longest sequence in a batch",
    ),
    "not causal": (_with(tf.LlamaConfig, is_causal=False), "its attention is not causal"),
    "bloom": (
        lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=4),
        "its forward takes no position_ids",
    ),
    "falcon": (
        lambda: tf.FalconConfig(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=4),
        "it does not use transformers' attention interface",
    ),
    "xglm": (
        lambda: tf.XGLMConfig(vocab_size=VOCABULARY, d_model=48, num_layers=2, attention_heads=4, ffn_dim=64),
        "0 of its 2 layers called the attention interface, 0 times; each must exactly once",
    ),
    "bert": (
        lambda: tf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        ),
        "with paged attention its logits are off by",
    ),
}


def make_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Random weights, large enough that the best token is clear."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.25, generator=generator)
            elif parameter.numel():
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))
    model.generation_config = tf.GenerationConfig(eos_token_id=2, pad_token_id=0, do_sample=False)
    return model.eval()


def save_model(config: PretrainedConfig, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Make a model and write it to `folder`, without a tokenizer."""
    model = make_model(config, seed)
    model.save_pretrained(folder)
    return model


def save_twin(of: Path, folder: Path) -> Path:
    """A servable folder: random weights in two narrow layers, with the tokenizer and chat template of a real model."""
    shutil.copytree(of, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = tf.AutoConfig.from_pretrained(of)
    config.update(
        {name: _COMMON[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")}
    )
    config.update({name: _COMMON[name] for name in ("num_attention_heads", "num_key_value_heads")})
    make_model(config).save_pretrained(folder)
    return folder


def save_refused(config: PretrainedConfig, folder: Path) -> None:
    """Write a model where one can be made, else (what the config alone rules out) only its config."""
    if config.model_type in ("t5", "gemma3") or getattr(config, "quantization_config", None):
        config.save_pretrained(folder)
    else:
        save_model(config, folder)
