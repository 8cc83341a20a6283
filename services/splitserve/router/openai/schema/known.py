"""Fields that clients send and this server does not serve: which values change nothing, and so are accepted.

null is always accepted. A field of none of these tables and of no model is unknown: let through, named once in the log.
"""

from __future__ import annotations

from collections.abc import Mapping

Accepted = Mapping[str, tuple[object, ...]]

# field -> the values that mean "do nothing"; any other is refused by name
_BOTH: Accepted = {
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "best_of": (1,),
    "echo": (False,),
    "prompt_logprobs": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logprob_token_ids": ([],),
    "truncate_prompt_tokens": (-1,),
    "truncation_side": ("left", "right"),
    "spaces_between_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": ({},),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "watermarking": (False,),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "stream_interval": (1,),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
}
CHAT: Accepted = {
    **_BOTH,
    "audio": (),
    "modalities": (["text"], []),
    "prediction": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "verbosity": ("medium",),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "return_prompt_text": (False,),
}
COMPLETIONS: Accepted = {**_BOTH, "suffix": ("",), "prompt_embeds": ([],)}
TOKENIZE: Accepted = {}

# accepted whatever they say: they concern storage, billing or tools, never the text
IGNORED = frozenset(
    {
        "store", "metadata", "parallel_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "session_id", "guided_decoding_backend", "guided_whitespace_pattern",
        "include_reasoning", "return_mm_kwargs",
    }
)  # fmt: skip
