"""What a process says of itself: a worker's digest to each router, everybody's beat, a page of metrics."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.protocol.handle import KvAddress


@dataclass(frozen=True, slots=True)
class DigestRow:
    """One job. `progress`: prefill = tokens computed; decode = output tokens of each sequence, delivered ones included."""

    rid: str
    attempt: int
    state: str  # PrefillState or DecodeState
    progress: tuple[int, ...]
    slot: int = 0
    handle_id: str = ""  # a held prefill's
    token: str = ""


@dataclass(frozen=True, slots=True)
class Digest:
    """All that this worker holds for this router, every second, also when empty. It repairs every lost message."""

    worker: str
    role: str
    incarnation: int
    stream_seq: int  # of the last TokenFrame to this router
    rows: tuple[DigestRow, ...]


@dataclass(frozen=True, slots=True)
class Beat:
    """Every 500 ms, from every process. A router sends one too, and hears its own."""

    name: str
    role: str
    incarnation: int
    model: str = ""  # the served model's name
    fingerprint: str = ""
    fingerprint_factors: tuple[tuple[str, str], ...] = ()  # (factor, value): a refusal names the one that differs
    block_tokens: int = 0
    max_model_len: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    promised_blocks: int = 0
    queued_tokens: int = 0
    running: int = 0
    waiting: int = 0  # could run and does not yet; awaiting KV is not waiting
    chunk_tokens: int = 0  # prefill budget of a step on this worker
    bytes_per_token: int = 0
    step_age_ms: int = 0  # how long the step under way has been running; 0 when idle
    bus_lag_ms: int = 0
    addresses: tuple[KvAddress, ...] = ()
    draining: bool = False
    metrics_url: str = ""
    ready: bool = True
    life: str = ""  # a router's: its name in jobs and subjects, new at each start, where `name` is the stable one


@dataclass(frozen=True, slots=True)
class MetricsGet:
    """Answered MetricsPage."""


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """`incarnation`: whose counters these are; a name's counters begin at zero with each."""

    text: str
    incarnation: int
