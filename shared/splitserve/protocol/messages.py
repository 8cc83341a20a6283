"""Every message on the bus, once. `MESSAGES` at the end is the table that the codec reads.

All are idempotent; their key is (rid, attempt, kind). Fields marked `U1`, `U2`, `U4`, `U8` or `U4Lists` travel as
little-endian bytes behind the JSON head, not in it (protocol D10). `incarnation` in a message *to* a worker is
the life it is meant for; another life refuses it by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from splitserve.protocol.handle import KvAddress, KvHandle, KvSource
from splitserve.protocol.params import SamplingParams, TokenLogprob
from splitserve.protocol.states import FailReason, FinishReason, RefuseReason


@dataclass(frozen=True, slots=True)
class Tail:
    """Mark of a field that travels behind the head: `code` is an `array` type code, `nested` a tuple of tuples."""

    code: str
    nested: bool = False


U1 = Annotated[tuple[int, ...], Tail("B")]
U2 = Annotated[tuple[int, ...], Tail("H")]
U4 = Annotated[tuple[int, ...], Tail("I")]
U8 = Annotated[tuple[int, ...], Tail("Q")]
U4Lists = Annotated[tuple[tuple[int, ...], ...], Tail("I", nested=True)]


# --- router -> worker, `w.<wid>.in` ---


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """Reserve a place for n = len(seeds) sequences, slots `slot` … `slot + n - 1`. Answered Accepted or Refused.

    `source` set: await the KV of prefill attempt `pa`; None: prefill here ("local").
    """

    rid: str
    router: str
    incarnation: int
    da: int
    slot: int
    pa: int
    source: KvSource | None
    ids: U4  # the prompt
    outputs: U4Lists  # n lists: tokens already delivered
    params: SamplingParams
    seeds: U8
    fingerprint: str
    ttl_s: float  # what is left of the request's deadline
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """Read `ids`, sample the first token of n = len(seeds) sequences, hold the blocks. Answered Accepted or Refused.

    For n = 1 `ids` is prompt + outputs and the first token has index len(ids) - prompt_len; for n > 1 it is the prompt.
    """

    rid: str
    router: str
    incarnation: int
    pa: int
    ids: U4
    prompt_len: int
    params: SamplingParams
    seeds: U8
    notify: tuple[str, ...]  # subjects for KvReady
    fingerprint: str
    ttl_s: float
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Amend:
    """`da` is new; what this worker had of the sequence is dropped and reserved anew. Answered Accepted or Refused."""

    rid: str
    router: str
    incarnation: int
    da: int
    pa: int
    source: KvSource | None
    outputs: U4Lists
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """End every attempt of `rid` up to and including `pa` (at a prefill worker) or `da` (at a decode worker)."""

    rid: str
    incarnation: int
    pa: int
    da: int
    reason: str


@dataclass(frozen=True, slots=True)
class ResumeRow:
    rid: str
    attempt: int  # pa at a prefill worker, da at a decode worker
    slot: int
    next_index: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Send again what was lost. Answered ResumeAnswer; the rows themselves come as TokenFrame or KvReady."""

    router: str
    incarnation: int
    rows: tuple[ResumeRow, ...]


@dataclass(frozen=True, slots=True)
class FinAck:
    """The router has everything of these slots; the worker forgets them."""

    router: str
    incarnation: int
    slots: U4


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you alive? Answered Pong."""

    incarnation: int


# --- answers ---


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job was taken. `queue_tokens`: uncached tokens before it in a prefill queue."""

    reserved_blocks: int = 0
    queue_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """A job was not taken; not to be asked of this worker again, for this request, before `retry_ms` (>= 150)."""

    reason: RefuseReason
    message: str
    retry_ms: int = 150


@dataclass(frozen=True, slots=True)
class ResumeAnswer:
    """The rows that this worker does not hold: (rid, attempt)."""

    unknown: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Pong:
    incarnation: int


@dataclass(frozen=True, slots=True)
class ReleaseAnswer:
    """Whether the handle was still held."""

    known: bool


@dataclass(frozen=True, slots=True)
class RenewAnswer:
    """Handles that this owner does not hold (any more): stop renewing them. A hint only; generations decide."""

    unknown: tuple[str, ...]


# --- to a prefill worker, `w.<wid>.lease` ---


@dataclass(frozen=True, slots=True)
class Release:
    """Drop the lease now. Answered ReleaseAnswer."""

    handle_id: str
    token: str


@dataclass(frozen=True, slots=True)
class Renew:
    """expiry = max(old, now + ttl) for each handle. Answered RenewAnswer on the reply subject."""

    handle_ids: tuple[str, ...]


# --- prefill worker -> router and decode worker ---


@dataclass(frozen=True, slots=True)
class PrefillDurations:
    """Seconds, measured inside the prefill worker."""

    queue_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class KvReady:
    """The prompt's KV is readable and the first token(s) sampled; `first_ids[i]` is sequence i's token at `index`."""

    handle: KvHandle
    tokens_ready: int
    final: bool
    index: int
    first_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # empty unless asked for
    cached_tokens: int
    durations: PrefillDurations
    finishes: tuple[int, ...] = ()  # FinishReason of each first token


# --- decode worker -> router, `r.<router>.ev` ---


@dataclass(frozen=True, slots=True)
class KvLoaded:
    rid: str
    worker: str
    da: int
    pa: int
    bytes: int
    blocks: int
    cached_tokens: int  # of the prompt, found in this worker's own prefix index: not fetched
    transport: str
    handle_s: float  # KvReady received -> fetch began
    transfer_s: float


@dataclass(frozen=True, slots=True)
class KvFailed:
    rid: str
    worker: str
    da: int
    pa: int
    reason: FailReason
    message: str


@dataclass(frozen=True, slots=True)
class DecodeDurations:
    """Seconds, measured inside the decode worker, of one attempt's first token."""

    queue_s: float  # loaded (or accepted, when local) -> first scheduled
    prefill_s: float  # computing the prompt here; 0 after a transfer
    first_step_s: float


@dataclass(frozen=True, slots=True)
class FirstRow:
    """What an attempt's first row adds; `row` is its place in the frame."""

    row: int
    cached_tokens: int  # of a local prefill; 0 after a transfer
    durations: DecodeDurations


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    row: int
    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row of a frame, taken out of its columns."""

    slot: int
    da: int
    first_index: int
    ids: tuple[int, ...]
    finish: FinishReason = FinishReason.RUNNING
    first: FirstRow | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenFrame:
    """The tokens of one step for one router, as columns. `stream_seq` counts this worker's frames to this router."""

    worker: str
    incarnation: int
    stream_seq: int
    slots: U4
    das: U2
    first_indices: U4
    counts: U2
    finishes: U1
    ids: U4
    firsts: tuple[FirstRow, ...] = ()
    logprobs: tuple[RowLogprobs, ...] = ()

    @classmethod
    def of(cls, worker: str, incarnation: int, stream_seq: int, rows: Iterable[TokenRow]) -> TokenFrame:
        rows = tuple(rows)
        return cls(
            worker,
            incarnation,
            stream_seq,
            slots=tuple(r.slot for r in rows),
            das=tuple(r.da for r in rows),
            first_indices=tuple(r.first_index for r in rows),
            counts=tuple(len(r.ids) for r in rows),
            finishes=tuple(int(r.finish) for r in rows),
            ids=tuple(i for r in rows for i in r.ids),
            firsts=tuple(
                FirstRow(n, r.first.cached_tokens, r.first.durations) for n, r in enumerate(rows) if r.first is not None
            ),
            logprobs=tuple(RowLogprobs(n, r.logprobs) for n, r in enumerate(rows) if r.logprobs),
        )

    def rows(self) -> Iterator[TokenRow]:
        firsts = {f.row: f for f in self.firsts}
        logprobs = {p.row: p.tokens for p in self.logprobs}
        at = 0
        for n, count in enumerate(self.counts):
            yield TokenRow(
                self.slots[n],
                self.das[n],
                self.first_indices[n],
                self.ids[at : at + count],
                FinishReason(self.finishes[n]),
                firsts.get(n),
                logprobs.get(n, ()),
            )
            at += count


@dataclass(frozen=True, slots=True)
class Preempted:
    """The pool ran dry and this sequence gave way: its reservation is gone."""

    rid: str
    worker: str
    da: int


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


# --- beats and metrics, on their own connection ---


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
    text: str


Message = (
    DecodeJob | PrefillJob | Amend | Cancel | Resume | FinAck | Ping
    | Accepted | Refused | ResumeAnswer | Pong | ReleaseAnswer | RenewAnswer
    | Release | Renew | KvReady | KvLoaded | KvFailed | TokenFrame | Preempted | Digest
    | Beat | MetricsGet | MetricsPage
)  # fmt: skip

MESSAGES: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        DecodeJob, PrefillJob, Amend, Cancel, Resume, FinAck, Ping,
        Accepted, Refused, ResumeAnswer, Pong, ReleaseAnswer, RenewAnswer,
        Release, Renew, KvReady, KvLoaded, KvFailed, TokenFrame, Preempted, Digest,
        Beat, MetricsGet, MetricsPage,
    )
}  # fmt: skip
