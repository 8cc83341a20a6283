"""The questions of the dashboards that vLLM publishes (performance, query statistics, and the older one of both), asked anew over a
split cluster, so that who comes from there finds them again."""

from __future__ import annotations

from panels import Dashboard, Panel, Row
from queries import E2E, ITL, TPOT, TTFT, I, M, gauge, latency, lengths, mean, quantile, quantiles, rate

PERFORMANCE = Dashboard(
    "vllm-performance",
    "vLLM performance",
    "Latency, throughput and what the schedulers do; the queries are those that vLLM's users ask, over all workers.",
    (
        latency("End-to-end latency", E2E, "Arrival to end, of finished requests."),
        latency("Time to first token", TTFT, "Arrival to the first token, measured once, at the router."),
        latency("Inter-token latency", ITL, "Between two token events of an answer."),
        latency("Time per output token", TPOT, "Mean over an answer, its first token left out."),
        Row(
            "Throughput",
            (
                Panel(
                    "Tokens per second",
                    "lines",
                    "short",
                    (
                        ("prompt", rate("vllm:prompt_tokens_total")),
                        ("generation", rate("vllm:generation_tokens_total")),
                        ("both", f"{rate('vllm:prompt_tokens_total')} + {rate('vllm:generation_tokens_total')}"),
                    ),
                ),
                Panel(
                    "Tokens in a step",
                    "heatmap",
                    "short",
                    (("{{le}}", rate("vllm:iteration_tokens_total_bucket", by="le")),),
                ),
                Panel(
                    "Step duration p90 by phase",
                    "lines",
                    "s",
                    (("{{job}}", quantile(0.9, "splitserve_step_seconds", by="job")),),
                ),
            ),
        ),
        Row(
            "Scheduler and cache",
            (
                Panel(
                    "Requests in the engines",
                    "lines",
                    "short",
                    (
                        ("running", f"sum(vllm:num_requests_running{{{M}}})"),
                        ("waiting", f"sum(vllm:num_requests_waiting{{{M}}})"),
                    ),
                ),
                Panel(
                    "KV cache in use",
                    "lines",
                    "percentunit",
                    (("{{engine}}", gauge("vllm:kv_cache_usage_perc", "engine", "max")),),
                ),
                Panel(
                    "Prompt tokens found in the prefix cache",
                    "lines",
                    "percentunit",
                    (("hits", f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}"),),
                ),
                Panel("Queue time", "lines", "s", quantiles("vllm:request_queue_time_seconds")),
                Panel(
                    "Prefill and decode time of a request",
                    "lines",
                    "s",
                    (
                        ("prefill", mean("vllm:request_prefill_time_seconds")),
                        ("decode", mean("vllm:request_decode_time_seconds")),
                        ("inference p90", quantile(0.9, "vllm:request_inference_time_seconds")),
                    ),
                ),
                Panel(
                    "Preemptions per second",
                    "lines",
                    "short",
                    (("{{engine}}", rate("vllm:num_preemptions_total", by="engine")),),
                ),
            ),
        ),
    ),
)

QUERY = Dashboard(
    "vllm-query",
    "vLLM query",
    "What is asked: how often, how long, and how it ends.",
    (
        Row(
            "Requests",
            (
                Panel(
                    "Answers per second by finish reason",
                    "stacked",
                    "reqps",
                    (("{{finished_reason}}", rate("vllm:request_success_total", by="finished_reason")),),
                    12,
                ),
                Panel("Requests per second", "number", "reqps", (("now", rate(f"{E2E}_count")),), 3),
                Panel("End-to-end p50", "number", "s", (("p50", quantile(0.5, E2E)),), 3),
                Panel("End-to-end p90", "number", "s", (("p90", quantile(0.9, E2E)),), 3),
                Panel("End-to-end p99", "number", "s", (("p99", quantile(0.99, E2E)),), 3),
            ),
        ),
        lengths("Prompt length", "vllm:request_prompt_tokens"),
        lengths("Answer length", "vllm:request_generation_tokens"),
        Row(
            "Tokens",
            (
                Panel(
                    "Prompt tokens per second by source",
                    "stacked",
                    "short",
                    (("{{source}}", rate("vllm:prompt_tokens_by_source_total", by="source")),),
                ),
                Panel(
                    "Generated tokens per second by model",
                    "stacked",
                    "short",
                    (("{{model_name}}", rate("vllm:generation_tokens_total", by="model_name")),),
                ),
                Panel(
                    "Longest answer of a request",
                    "lines",
                    "short",
                    quantiles("vllm:request_max_num_generation_tokens"),
                ),
                Panel("max_tokens asked for", "lines", "short", quantiles("vllm:request_params_max_tokens")),
                Panel("n asked for", "lines", "short", (("mean", mean("vllm:request_params_n")),)),
                Panel(
                    "Prompt tokens that were computed",
                    "lines",
                    "short",
                    quantiles("vllm:request_prefill_kv_computed_tokens"),
                ),
            ),
        ),
        Row(
            "Not served",
            (
                Panel(
                    "Refused per second by reason",
                    "lines",
                    "reqps",
                    (("{{reason}}", rate("splitserve_requests_refused_total", by="reason")),),
                ),
                Panel(
                    "Failed per second by code",
                    "lines",
                    "reqps",
                    (("{{code}}", rate("splitserve_requests_failed_total", by="code")),),
                ),
                Panel(
                    "Left by their client, by state",
                    "lines",
                    "reqps",
                    (("{{state}}", rate("splitserve_requests_cancelled_total", by="state")),),
                ),
                Panel(
                    "HTTP answers per second by status",
                    "stacked",
                    "reqps",
                    (("{{status}}", f"sum by (status) (rate(http_requests_total{I}))"),),
                ),
            ),
        ),
    ),
)
