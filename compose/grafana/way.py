"""A request's way: objectives, stages, placement, the data plane, the balance of the phases, health."""

from __future__ import annotations

from panels import Dashboard, Panel, Row
from queries import TTFT, M, gauge, quantile, rate

TTFT_STAGES = "tokenise|place|reserve|prefill_bus|prefill_queue|prefill|other|detokenise"
GAP_STAGES = "handle|decode_queue|transfer|first_step|gap_other"


def stages(title: str, which: str, whole: str, about: str) -> Panel:
    """Mean seconds of each stage in one `whole`, so that the stack's height is the mean of the whole."""
    part = rate("splitserve_stage_seconds_sum", by="stage", where=f'stage=~"{which}"')
    expr = f"{part} / on () group_left () {rate(f'{whole}_count')}"
    return Panel(title, "stacked", "s", (("{{stage}}", expr),), 12, about)


def by_phase(title: str, name: str, unit: str = "short") -> Panel:
    return Panel(title, "lines", unit, (("{{job}}", f"{name}{{{M}}}"),), 6)


WAY = Dashboard(
    "splitserve-way",
    "splitserve: a request's way through the phases",
    "From the router to prefill, over the data plane to decode: where the time goes and where work piles up.",
    (
        Row(
            "Objectives",
            (
                Panel(
                    "Requests per second",
                    "lines",
                    "reqps",
                    (
                        ("finished", f"splitserve:requests_finished:rate5m{{{M}}}"),
                        ("within both objectives, at least", f"splitserve:goodput_requests:rate5m{{{M}}}"),
                    ),
                    12,
                ),
                Panel(
                    "Share within its objective",
                    "lines",
                    "percentunit",
                    (
                        ("first token", f"splitserve:time_to_first_token_within_objective:ratio_rate5m{{{M}}}"),
                        ("token pace", f"splitserve:time_per_output_token_within_objective:ratio_rate5m{{{M}}}"),
                        ("both, at least", f"splitserve:requests_within_objectives:ratio_rate5m{{{M}}}"),
                    ),
                    12,
                ),
            ),
        ),
        Row(
            "Where the time goes",
            (
                stages(
                    "Time to first token by stage",
                    TTFT_STAGES,
                    TTFT,
                    "Mean; the height is the mean time to first token.",
                ),
                stages(
                    "First gap by stage",
                    GAP_STAGES,
                    "splitserve_first_gap_seconds",
                    "Mean, of requests whose KV moved from prefill to decode; the height is the mean time from first to second token.",
                ),
            ),
        ),
        Row(
            "Placement",
            (
                Panel(
                    "Live requests by state",
                    "stacked",
                    "short",
                    (("{{state}}", gauge("splitserve_requests", "state")),),
                ),
                Panel(
                    "Placements per second",
                    "stacked",
                    "reqps",
                    (("{{decision}}: {{reason}}", rate("splitserve_placements_total", by="decision, reason")),),
                ),
                Panel(
                    "Placed anew, fetched again",
                    "lines",
                    "reqps",
                    (
                        ("{{phase}}: {{reason}}", rate("splitserve_replacements_total", by="phase, reason")),
                        ("resumes", rate("splitserve_resumes_total")),
                    ),
                ),
            ),
        ),
        Row(
            "KV from prefill to decode",
            (
                Panel(
                    "Transfer time",
                    "lines",
                    "s",
                    (
                        ("p50 {{transport}}", quantile(0.5, "splitserve_kv_transfer_seconds", by="transport")),
                        ("p99 {{transport}}", quantile(0.99, "splitserve_kv_transfer_seconds", by="transport")),
                    ),
                ),
                Panel(
                    "Transferred per second",
                    "stacked",
                    "Bps",
                    (("{{transport}}", rate("splitserve_kv_transfer_bytes_total", by="transport")),),
                ),
                Panel(
                    "Transfers that failed, leases that expired",
                    "lines",
                    "short",
                    (
                        ("{{reason}}", rate("splitserve_kv_failed_total", by="reason")),
                        ("fenced", rate("splitserve_kv_fenced_total")),
                        ("lease expired", rate("splitserve_kv_lease_expired_total")),
                    ),
                ),
                Panel(
                    "Held for decode", "lines", "bytes", (("{{engine}}", gauge("splitserve_kv_held_bytes", "engine")),)
                ),
                Panel(
                    "Waiting for each other",
                    "lines",
                    "short",
                    (
                        ("leases", f"sum(splitserve_kv_leases{{{M}}})"),
                        ("awaiting KV", f"sum(splitserve_requests_awaiting_kv{{{M}}})"),
                    ),
                ),
                Panel(
                    "Promised blocks",
                    "lines",
                    "short",
                    (("{{engine}}", gauge("splitserve_promised_blocks", "engine")),),
                ),
            ),
        ),
        Row(
            "Balance of the phases",
            (
                Panel(
                    "Tokens computed per second",
                    "lines",
                    "short",
                    (
                        ("prefill tokens on {{job}}", rate("splitserve_prefill_tokens_total", by="job")),
                        ("decode tokens on {{job}}", rate("splitserve_decode_tokens_total", by="job")),
                    ),
                    6,
                ),
                by_phase("Share of time in a step", "splitserve_phase:busy:ratio_rate5m", "percentunit"),
                by_phase("Waiting", "splitserve_phase:requests_waiting:sum"),
                by_phase("KV in use, fullest worker", "splitserve_phase:kv_cache_usage:max", "percentunit"),
            ),
        ),
        Row(
            "Health",
            (
                Panel("Live workers", "lines", "short", (("{{role}}", gauge("splitserve_workers", "role", "max")),), 6),
                Panel(
                    "Oldest request, oldest step",
                    "lines",
                    "s",
                    (
                        ("request", f"max(splitserve_oldest_request_age_seconds{{{M}}})"),
                        ("step", f"max(splitserve_step_age_seconds{{{M}}})"),
                    ),
                    6,
                ),
                Panel(
                    "Event-loop lag p99",
                    "lines",
                    "s",
                    (("{{engine}}", quantile(0.99, "splitserve_event_loop_lag_seconds", by="engine")),),
                    6,
                ),
                Panel(
                    "Bus round trip p99",
                    "lines",
                    "s",
                    (("{{engine}}", quantile(0.99, "splitserve_bus_round_trip_seconds", by="engine")),),
                    6,
                ),
            ),
        ),
    ),
)
