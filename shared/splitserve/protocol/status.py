"""What a router shows of itself, its fleet and its requests: the JSON of `/status.json`, read by page and `splitserve top`.

Never a prompt, an answer or a user. Durations are seconds, shares are 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VERSION = 1


@dataclass(frozen=True, slots=True)
class RouterView:
    """`why_not_ready` is empty when ready. `degraded`: the store is away, requests go on without it."""

    name: str
    model: str
    version: str
    up_s: float
    why_not_ready: str
    bus_up: bool
    degraded: bool


@dataclass(frozen=True, slots=True)
class LoadView:
    """This router's own requests. Medians and outcomes of the last minute, tokens/s of the last ten seconds."""

    states: Mapping[str, int]  # live requests
    waiting: int  # without a worker
    waiting_tokens: int
    tokens_per_s: float
    ttft_s: float | None
    inter_token_s: float | None
    outcomes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker by its last beat. `requests`: live ones of this router; `since_s`: how long it is known in this life."""

    name: str
    role: str
    state: str  # serving, starting, suspect, draining, stuck, lost
    running: int
    waiting: int
    queued_tokens: int
    requests: int
    kv_blocks: int
    kv_used: float
    kv_promised: float
    step_age_s: float
    silent_s: float
    since_s: float


@dataclass(frozen=True, slots=True)
class LinkView:
    """Live requests of this router that one prefill worker reads, or has read, for one decode worker."""

    prefill: str
    decode: str
    requests: int
    moving: int  # those whose KV is on its way


@dataclass(frozen=True, slots=True)
class RequestView:
    """`bar` sums to `seconds`: its last part is what none of the others explains. `ended_s` ago; None: it lives."""

    id: str
    state: str
    prefill: str
    decode: str
    attempts_prefill: int
    attempts_decode: int
    workers_lost: int
    prompt_tokens: int
    completion_tokens: int
    error: str  # wire code of a failed one
    seconds: float
    ended_s: float | None
    bar: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    version: int
    router: RouterView
    load: LoadView
    workers: tuple[WorkerView, ...]
    links: tuple[LinkView, ...]
    live: tuple[RequestView, ...]
    live_total: int
    recent: tuple[RequestView, ...]
