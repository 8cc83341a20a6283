"""The families that vLLM 0.32 has: its names, types, labels and buckets, so that its dashboards and alerts work unchanged."""

from __future__ import annotations

from splitserve.telemetry import buckets
from splitserve.telemetry.family import Family, Kind, Owner, constant, each, rare

C, G, H, S = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM, Kind.SUMMARY
R, D, W = Owner.ROUTER, Owner.DECODE, Owner.WORKER

NO_MULTIMODAL = constant("no multimodal inputs are served")
NO_REPETITION = "repetition detection is not served"
ALWAYS_AWAKE = "workers do not sleep"
NOT_DEFERRED = "a job that awaits KV is in splitserve_requests_awaiting_kv; nothing else defers one"
ONE_TIER = "KV is cached in the workers' pools only"
COUNTED_WHERE_COMPUTED = "KV comes from workers of this cluster, which counted the tokens when they computed them"

CACHE_CONFIG_LABELS = (
    "_block_size_resolved",
    "block_size",
    "cache_dtype",
    "cache_hit_alignment_tokens",
    "effective_attention_block_size",
    "enable_mamba_shared_prefix_checkpoint",
    "enable_prefix_caching",
    "gpu_memory_utilization",
    "hash_block_size",
    "is_attention_free",
    "kv_cache_dtype_skip_layers",
    "kv_cache_layout",
    "kv_cache_max_concurrency",
    "kv_cache_memory_bytes",
    "kv_cache_size_tokens",
    "kv_offloading_backend",
    "kv_offloading_size",
    "kv_sharing_fast_prefill",
    "mamba_block_size",
    "mamba_cache_dtype",
    "mamba_cache_mode",
    "mamba_page_size_padded",
    "mamba_ssm_cache_dtype",
    "num_cpu_blocks",
    "num_gpu_blocks",
    "num_gpu_blocks_override",
    "prefix_cache_retention_interval",
    "prefix_caching_hash_algo",
    "prefix_match_unit",
    "replayssm_buffer_len",
    "skip_page_size_padded",
    "sliding_window",
    "swa_bounded_replay",
    "use_kda_recoverssm",
    "use_replayssm",
    "user_specified_block_size",
)


def request_families(max_model_len: int) -> tuple[Family, ...]:
    """Requests, where they are: at the router. Token counts are bounded by `max_model_len`."""
    tokens = buckets.decades(max_model_len)
    cached = (*each("device"), *(one for tier in ("host", "p2p", "disk", "external_unspecified") for one in constant(ONE_TIER, tier)))  # fmt: skip
    sources = (*each("local_compute", "local_cache_hit"), *constant(COUNTED_WHERE_COMPUTED, "external_kv_transfer"))
    reasons = (*each("stop", "length", "abort"), *rare("an engine or a cluster that lost a request", "error"), *constant(NO_REPETITION, "repetition"))  # fmt: skip
    refused = (*each("max_num_queued_reqs"), *rare("more prompt tokens waiting than --max-queued-tokens", "max_num_queued_tokens"))  # fmt: skip
    return (
        Family("vllm:time_to_first_token_seconds", H, R, "Time from a request's arrival to its first token.", (), buckets.TTFT),
        Family("vllm:inter_token_latency_seconds", H, R, "Time between two tokens of an answer.", (), buckets.GAP),
        Family("vllm:request_time_per_output_token_seconds", H, R, "Mean time per output token of a request, the first left out.", (), buckets.GAP),
        Family("vllm:e2e_request_latency_seconds", H, R, "Time from a request's arrival to its end.", (), buckets.LATENCY),
        Family("vllm:request_queue_time_seconds", H, R, "Time that a request waited for its prompt to be begun.", (), buckets.LATENCY),
        Family("vllm:request_prefill_time_seconds", H, R, "Time in which a request's prompt was computed.", (), buckets.LATENCY),
        Family("vllm:request_decode_time_seconds", H, R, "Time from a request's first token to its last.", (), buckets.LATENCY),
        Family("vllm:request_inference_time_seconds", H, R, "Prefill and decode time of a request.", (), buckets.LATENCY),
        Family("vllm:prompt_tokens", C, R, "Prompt tokens, of prompts whose first token arrived."),
        Family("vllm:prompt_tokens_by_source", C, R, "Prompt tokens by where they came from; sums to vllm:prompt_tokens.", ("source",), (), sources),
        Family("vllm:prompt_tokens_cached", C, R, "Prompt tokens found in the cache of the worker that read the prompt."),
        Family("vllm:prompt_tokens_cached_by_source", C, R, "Cached prompt tokens by the tier that held them.", ("source",), (), cached),
        Family("vllm:generation_tokens", C, R, "Tokens of answers, as they arrive."),
        Family("vllm:request_success", C, R, "Ended answers by reason.", ("finished_reason",), (), reasons),
        Family("vllm:admission_rejections", C, R, "Requests refused at the door because too much waits, by bound.", ("reason",), (), refused, ("model_name",)),
        Family("vllm:request_prompt_tokens", H, R, "Prompt tokens of a request.", (), tokens),
        Family("vllm:request_generation_tokens", H, R, "Output tokens of an answer.", (), tokens),
        Family("vllm:request_max_num_generation_tokens", H, R, "Output tokens of a request's longest answer.", (), tokens),
        Family("vllm:request_params_n", H, R, "The n of requests.", (), buckets.N),
        Family("vllm:request_params_max_tokens", H, R, "The max_tokens of requests.", (), tokens),
        Family("vllm:request_num_preemptions", H, R, "How often a request gave way to others.", (), buckets.PREEMPTIONS),
        Family("vllm:request_prefill_kv_computed_tokens", H, R, "Prompt tokens of a request that were computed.", (), tokens),
    )  # fmt: skip


def http_families() -> tuple[Family, ...]:
    """The router's HTTP, as prometheus-fastapi-instrumentator names it; no label says whose."""
    return (
        Family("http_requests", C, R, "HTTP answers.", ("handler", "method", "status"), identity=()),
        Family("http_request_size_bytes", S, R, "Bytes of request bodies.", ("handler",), identity=()),
        Family("http_response_size_bytes", S, R, "Bytes of response bodies.", ("handler",), identity=()),
        Family("http_request_duration_highr_seconds", H, R, "Time to answer, finely, of all routes.", (), buckets.HTTP_FINE, identity=()),
        Family("http_request_duration_seconds", H, R, "Time to answer, coarsely, by route.", ("handler", "method"), buckets.HTTP_COARSE, identity=()),
    )  # fmt: skip


def engine_families() -> tuple[Family, ...]:
    """The engine of each worker."""
    waiting = (*each("capacity"), *constant(NOT_DEFERRED, "deferred"))
    sleeping = (*constant(ALWAYS_AWAKE, "awake", value=1.0), *constant(ALWAYS_AWAKE, "weights_offloaded"), *constant(ALWAYS_AWAKE, "discard_all"))  # fmt: skip
    return (
        Family("vllm:num_requests_running", G, W, "Requests that are being computed."),
        Family("vllm:num_requests_waiting", G, W, "Requests that wait to be computed."),
        Family("vllm:num_requests_waiting_by_reason", G, W, "Requests that wait to be computed, by what they wait for.", ("reason",), (), waiting),
        Family("vllm:engine_sleep_state", G, W, "1 for the state that the engine is in.", ("sleep_state",), (), sleeping),
        Family("vllm:kv_cache_usage_perc", G, W, "Share of KV blocks in use, leased ones included; 1 = all."),
        Family("vllm:prefix_cache_queries", C, W, "Prompt tokens looked up in the prefix cache, where a prompt is computed."),
        Family("vllm:prefix_cache_hits", C, W, "Prompt tokens found in the prefix cache, where a prompt is computed."),
        Family("vllm:external_prefix_cache_queries", C, D, "Prompt tokens asked of handles."),
        Family("vllm:external_prefix_cache_hits", C, D, "Prompt tokens got from handles."),
        Family("vllm:mm_cache_queries", C, W, "Multimodal inputs looked up.", (), (), NO_MULTIMODAL),
        Family("vllm:mm_cache_hits", C, W, "Multimodal inputs found.", (), (), NO_MULTIMODAL),
        Family("vllm:num_preemptions", C, W, "Requests that gave way to others.", (), (), rare("a KV pool that ran dry")),
        Family("vllm:iteration_tokens_total", H, W, "Tokens computed in a step.", (), buckets.ITERATION),
        Family("vllm:cache_config_info", G, W, "1; the labels tell how the KV cache is set up.", CACHE_CONFIG_LABELS, identity=("engine",)),
        Family("vllm:estimated_flops_per_gpu", C, W, "Floating point operations, estimated from tokens and model sizes."),
        Family("vllm:estimated_read_bytes_per_gpu", C, W, "Bytes read from memory, estimated likewise."),
        Family("vllm:estimated_write_bytes_per_gpu", C, W, "Bytes written to memory, estimated likewise."),
    )  # fmt: skip
