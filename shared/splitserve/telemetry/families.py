"""The table of metric families: name, type, labels, buckets and the one role that owns each.

`vllm:*` names, types, labels and buckets are vLLM 0.32's, so that its dashboards and alerts work unchanged; what vLLM has
no name for is `splitserve_*`. `engine` is the stable name of the process that owns the series.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Owner(StrEnum):
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    WORKER = "worker"  # prefill and decode alike
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Family:
    """`labels` beside `model_name` and `engine`, which every family has."""

    name: str
    kind: Kind
    owner: Owner
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _decades(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, … up to `longest`, as vLLM scales its token histograms with max_model_len."""
    found: list[float] = []
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale > longest:
                return tuple(found)
            found.append(float(step * scale))
        scale *= 10


_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TRANSFER = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def families(max_model_len: int) -> tuple[Family, ...]:
    """The whole table; buckets that count tokens end at `max_model_len`."""
    C, G, H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM  # noqa: N806  # a table is read by columns
    R, P, D, W, A = Owner.ROUTER, Owner.PREFILL, Owner.DECODE, Owner.WORKER, Owner.ALL  # noqa: N806
    tokens = _decades(max_model_len)
    return (
        # requests, where they are: the router
        Family("vllm:time_to_first_token_seconds", H, R, "Time from a request's arrival to its first token.", (), _TTFT),
        Family("vllm:inter_token_latency_seconds", H, R, "Time between two tokens of a sequence.", (), _GAP),
        Family("vllm:request_time_per_output_token_seconds", H, R, "Mean time per output token of a request.", (), _GAP),
        Family("vllm:e2e_request_latency_seconds", H, R, "Time from a request's arrival to its end.", (), _LATENCY),
        Family("vllm:request_queue_time_seconds", H, R, "Time that a request waited for its prefill.", (), _LATENCY),
        Family("vllm:request_prefill_time_seconds", H, R, "Time from a request's first schedule to its first token.", (), _LATENCY),
        Family("vllm:request_decode_time_seconds", H, R, "Time from a request's first token to its last.", (), _LATENCY),
        Family("vllm:request_inference_time_seconds", H, R, "Prefill and decode time of a request.", (), _LATENCY),
        Family("vllm:prompt_tokens", C, R, "Prompt tokens of requests whose first token arrived."),
        Family("vllm:prompt_tokens_cached", C, R, "Prompt tokens that were not computed."),
        Family("vllm:generation_tokens", C, R, "Tokens delivered to clients."),
        Family("vllm:request_success", C, R, "Requests that ended well, by reason.", ("finished_reason",)),
        Family("vllm:request_prompt_tokens", H, R, "Prompt tokens of a request.", (), tokens),
        Family("vllm:request_generation_tokens", H, R, "Output tokens of a request.", (), tokens),
        Family("vllm:request_params_n", H, R, "The n of requests.", (), (1, 2, 5, 10, 20)),
        Family("vllm:request_params_max_tokens", H, R, "The max_tokens of requests.", (), tokens),
        Family("splitserve_requests", G, R, "Live requests by state.", ("state",)),
        Family("splitserve_requests_failed", C, R, "Requests that ended badly, by error code.", ("code",)),
        Family("splitserve_requests_cancelled", C, R, "Requests that their client left, by state.", ("state",)),
        Family("splitserve_state_degraded", G, R, "1 while Redis is away."),
        Family("splitserve_workers", G, R, "Live workers by role.", ("role",)),
        # the engine of each worker
        Family("vllm:num_requests_running", G, W, "Sequences in the running batch."),
        Family("vllm:num_requests_waiting", G, W, "Sequences that wait to be computed."),
        Family("vllm:kv_cache_usage_perc", G, W, "Share of KV blocks in use, leased ones included; 1 = all."),
        Family("vllm:prefix_cache_queries", C, W, "Prompt tokens looked up in the prefix cache, where a prompt is computed."),
        Family("vllm:prefix_cache_hits", C, W, "Prompt tokens found in the prefix cache, where a prompt is computed."),
        Family("vllm:external_prefix_cache_queries", C, D, "Prompt tokens asked of handles."),
        Family("vllm:external_prefix_cache_hits", C, D, "Prompt tokens got from handles."),
        Family("vllm:num_preemptions", C, W, "Sequences that gave way to others."),
        Family("vllm:iteration_tokens_total", H, W, "Tokens computed in a step.", (), tuple(float(n) for n in _ITERATION)),
        Family("splitserve_prefill_tokens", C, W, "Prompt tokens computed by this worker."),
        Family("splitserve_decode_tokens", C, W, "Output tokens sampled by decode steps of this worker."),
        Family("splitserve_step_seconds", H, W, "Duration of a step.", (), _TRANSFER),
        Family("splitserve_promised_blocks", G, W, "Blocks promised to accepted jobs."),
        # KV on its way
        Family("splitserve_kv_held_bytes", G, P, "Bytes of finished KV that wait to be fetched."),
        Family("splitserve_kv_leases", G, P, "Handles under a lease."),
        Family("splitserve_kv_lease_expired", C, P, "Leases that ended before a release."),
        Family("splitserve_requests_awaiting_kv", G, D, "Reserved jobs whose KV has not come."),
        Family("splitserve_kv_transfer_seconds", H, D, "Duration of a fetch.", ("transport",), _TRANSFER),
        Family("splitserve_kv_transfer_bytes", C, D, "Bytes of KV fetched.", ("transport",)),
        Family("splitserve_kv_transfer_blocks", C, D, "Blocks of KV fetched.", ("transport",)),
        Family("splitserve_kv_failed", C, D, "Fetches that failed, by reason.", ("reason",)),
        Family("splitserve_kv_fenced", C, D, "Blocks given to other content before they were read."),
        # every process
        Family("splitserve_bus_errors", C, A, "Errors of the bus connection."),
        Family("splitserve_bus_reconnects", C, A, "Reconnections to the bus."),
    )  # fmt: skip
