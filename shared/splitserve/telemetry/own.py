"""The families that vLLM has no name for: `splitserve_*`."""

from __future__ import annotations

from splitserve.protocol.states import FailReason, RefuseReason, RequestState, Role
from splitserve.telemetry import buckets
from splitserve.telemetry.family import Family, Kind, Owner, Series, constant, each, rare

C, G, H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
R, P, D, W, A = Owner.ROUTER, Owner.PREFILL, Owner.DECODE, Owner.WORKER, Owner.ALL

TTFT_STAGES = ("tokenise", "place", "reserve", "prefill_bus", "prefill_queue", "prefill", "other", "detokenise")
GAP_STAGES = ("handle", "decode_queue", "transfer", "first_step", "gap_other")
LIVE_STATES = tuple(state.value for state in RequestState if not state.terminal)
TRANSPORTS = ("shm", "tcp", "cuda_ipc", "nixl")
SHM_AND_TCP = (*each("shm"), *rare("workers on several hosts, or --kv-transport tcp", "tcp"))
_NIXL = rare("--kv-transport nixl", "nixl")
FETCHED_BY = (*SHM_AND_TCP, *rare("workers on GPUs of one host", "cuda_ipc"), *_NIXL)
PLACEMENTS = (
    Series(("split", "asked")),  # --split always, or the request said so
    Series(("split", "faster"), rare="a decode worker so busy that another reads a prompt sooner"),
    Series(("split", "long_context"), rare="a long answer that was moved"),
    Series(("local", "asked"), rare="--split never"),
    Series(("local", "no_prefill_worker"), rare="no prefill worker that can be asked"),
    Series(("local", "idle"), rare="--split auto and an idle decode worker"),
    Series(("local", "short"), rare="--split auto and one chunk of uncached tokens or less"),
    Series(("local", "faster"), rare="--split auto and prefill workers that are busier"),
)
REPLACED = (
    *(
        Series((phase, reason), rare="a worker that died, refused or was cut off")
        for phase, reasons in (
            ("prefill", ("worker_lost", "refused", "no_answer", "unknown", "no_progress", "kv_failed")),
            ("decode", ("worker_lost", "refused", "no_answer", "unknown", "preempted", "outage")),
        )
        for reason in reasons
    ),
    Series(("prefill", "moved"), rare="a worker with nothing to read while a prompt waits behind others elsewhere"),
)
REFUSED = (
    *each("invalid_value", "unsupported_value", "context_length_exceeded", "invalid_api_key", "model_not_found", "body_too_large"),
    *each("max_num_queued_reqs"),
    *rare("more prompt tokens waiting than --max-queued-tokens", "max_num_queued_tokens"),
    *rare("no worker with room for --queue-timeout", "queue_timeout"),
    *rare("no worker that can be asked", "no_workers"),
    *rare("a router that is leaving, or whose bus is away", "unavailable"),
)  # fmt: skip
CANCELLED = (
    *each("decoding"),
    *rare("a client that leaves before its first token", "queued", "prefilling"),
    *rare("a client that leaves in the milliseconds of a transfer", "transferring"),
)
FAILED = (
    *rare(
        "a request that the cluster lost",
        *("internal_error", "unavailable", "bus_unavailable", "no_workers", "draining"),
        *("request_failed", "deadline_exceeded", "loss_budget_spent", "engine_failed"),
    ),
    *rare("a stream of several prompts of which one found no room", "overloaded"),
)
LOST_BUS = rare("a NATS server that went away")


def request_families() -> tuple[Family, ...]:
    """What a router knows of its requests."""
    return (
        Family("splitserve_stage_seconds", H, R, "Where time went: the stages of TTFT (tokenise to detokenise, with other) and of the first gap (handle to first_step, with gap_other).", ("stage",), buckets.STAGE, each(*TTFT_STAGES, *GAP_STAGES)),
        Family("splitserve_first_gap_seconds", H, R, "Time from the first token of a split request to its second: the sum of its gap stages.", (), buckets.STAGE),
        Family("splitserve_requests", G, R, "Live requests by state.", ("state",), (), each(*LIVE_STATES)),
        Family("splitserve_oldest_request_age_seconds", G, R, "Age of the oldest live request; 0 when there is none."),
        Family("splitserve_requests_failed", C, R, "Requests that ended badly, by error code.", ("code",), (), FAILED),
        Family("splitserve_requests_cancelled", C, R, "Requests that their client left, by the state they were in.", ("state",), (), CANCELLED),
        Family("splitserve_requests_refused", C, R, "Requests that were not taken, by reason.", ("reason",), (), REFUSED),
        Family("splitserve_placements", C, R, "Placements by decision (split, local) and why.", ("decision", "reason"), (), PLACEMENTS),
        Family("splitserve_replacements", C, R, "Requests placed anew, by the phase whose worker was given up and why.", ("phase", "reason"), (), REPLACED),
        Family("splitserve_resumes", C, R, "Answers fetched again from a worker after rows were lost.", (), (), rare("frames that were lost")),
        Family("splitserve_state_degraded", G, R, "1 while Redis is away.", (), (), rare("a Redis server that went away")),
        Family("splitserve_workers", G, R, "Live workers by role.", ("role",), (), each(Role.PREFILL, Role.DECODE)),
    )  # fmt: skip


def worker_families() -> tuple[Family, ...]:
    """What workers do beside what vLLM counts."""
    return (
        Family("splitserve_prefill_tokens", C, W, "Prompt tokens computed by this worker."),
        Family("splitserve_decode_tokens", C, W, "Output tokens sampled by decode steps of this worker."),
        Family("splitserve_replayed_tokens", C, W, "Tokens computed again where n > 1: the end of a prompt, behind its last whole block."),
        Family("splitserve_step_seconds", H, W, "Duration of a step.", (), buckets.TRANSFER),
        Family("splitserve_step_age_seconds", G, W, "Age of the step under way; 0 between steps."),
        Family("splitserve_promised_blocks", G, W, "Blocks promised to accepted jobs."),
        Family("splitserve_jobs_refused", C, W, "Jobs that this worker did not take, by reason.", ("reason",), (), rare("a full or leaving worker, or a message for another life or attempt", *RefuseReason)),
    )  # fmt: skip


def kv_families() -> tuple[Family, ...]:
    """KV on its way."""
    failed = rare("a prefill worker that died or gave its blocks away", *FailReason)
    return (
        Family("splitserve_kv_held_bytes", G, P, "Bytes of finished KV that wait to be fetched."),
        Family("splitserve_kv_leases", G, P, "Handles under a lease."),
        Family("splitserve_kv_lease_expired", C, P, "Leases that ended before a release.", (), (), rare("a decode worker that died before it fetched")),
        Family("splitserve_kv_readers", G, P, "Readers of this worker's pool, by transport: processes that map it, open connections.", ("transport",), (), (*SHM_AND_TCP, *_NIXL)),
        Family("splitserve_kv_sent_bytes", C, P, "Bytes of KV sent; readers of shared memory copy by themselves and are not seen here.", ("transport",), (), (*constant("readers copy out of shared memory themselves", "shm"), *SHM_AND_TCP[1:])),
        Family("splitserve_kv_sends_refused", C, P, "Transfers over tcp that no live lease allowed.", (), (), rare("a handle asked for after its end")),
        Family("splitserve_kv_sends_severed", C, P, "Transfers over tcp that began and did not end.", (), (), rare("a lease or a connection that ended during a send")),
        Family("splitserve_requests_awaiting_kv", G, D, "Reserved jobs whose KV has not come."),
        Family("splitserve_kv_transfer_seconds", H, D, "Duration of a fetch.", ("transport",), buckets.TRANSFER, FETCHED_BY),
        Family("splitserve_kv_transfer_bytes", C, D, "Bytes of KV fetched.", ("transport",), (), FETCHED_BY),
        Family("splitserve_kv_transfer_blocks", C, D, "Blocks of KV fetched.", ("transport",), (), FETCHED_BY),
        Family("splitserve_kv_failed", C, D, "Fetches that failed, by reason.", ("reason",), (), failed),
        Family("splitserve_kv_fenced", C, D, "Fetches that found blocks given to other content; also in splitserve_kv_failed.", (), (), rare("a lease that ended during a fetch")),
    )  # fmt: skip


def process_families() -> tuple[Family, ...]:
    """Every process."""
    return (
        Family("splitserve_build_info", G, A, "1; the labels tell what runs.", ("version", "role", "python")),
        Family("splitserve_event_loop_lag_seconds", H, A, "How late the event loop wakes a timer.", (), buckets.LAG),
        Family("splitserve_bus_round_trip_seconds", H, A, "Time until a beat sent over the bus is heard again.", (), buckets.LAG),
        Family("splitserve_bus_errors", C, A, "Errors of the bus connection.", (), (), LOST_BUS),
        Family("splitserve_bus_reconnects", C, A, "Reconnections to the bus.", (), (), LOST_BUS),
    )  # fmt: skip
