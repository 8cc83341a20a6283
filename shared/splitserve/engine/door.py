"""The only two doors of an engine: commands in, one batch of events a step out.

`worker/host` runs the engine in a thread behind these; the simulator runs it without one. Nothing here loads torch.

A sequence group is one job: n = len(seeds) sequences over one prompt, keyed by `key` (opaque to the engine). Token
index i counts output tokens of a sequence from 0; `outputs` are those delivered before this attempt.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum

from splitserve.kv.pool import PoolStats as PoolStats
from splitserve.protocol.handle import GroupBlocks
from splitserve.protocol.params import SamplingParams, TokenLogprob
from splitserve.protocol.states import FinishReason

Key = Hashable


class Mode(StrEnum):
    PREFILL = "prefill"  # compute the prompt, sample the first token(s), hold the blocks: `Prefilled`
    LOCAL = "local"  # compute the prompt, then decode: `Tokens`
    AWAIT = "await"  # allocate the prompt's blocks now (`Reserved`), decode once `Loaded`


# --- commands ---


@dataclass(frozen=True, slots=True)
class Add:
    """Take a job. `ids`: what to compute or await, prompt first.

    PREFILL and AWAIT, n = 1: prompt + outputs (the first new token has index len(outputs[0])). PREFILL, n > 1: the prompt,
    outputs empty lists. AWAIT, n > 1: the prompt; outputs are replayed in the chunk budget. LOCAL: the prompt; outputs are
    recomputed with it. Blocks for all of `ids` are allocated at once: in AWAIT now or never, else when
    the first chunk is scheduled. A lower `priority` goes first and gives way last.
    """

    key: Key
    mode: Mode
    ids: tuple[int, ...]
    prompt_len: int
    outputs: tuple[tuple[int, ...], ...]
    params: SamplingParams
    seeds: tuple[int, ...]
    priority: int = 0
    cache_salt: str = ""
    counted: bool = True  # False: `StepStats` leaves it out


@dataclass(frozen=True, slots=True)
class Loaded:
    """The KV of an AWAIT job is in its blocks, validated: index them, append `first_ids` (token `index` of each sequence)
    and join the batch. `first_ids` empty: every sequence already has its next input in `outputs`."""

    key: Key
    index: int
    first_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop a job, or one of its sequences (`sequence` counts from 0). Blocks are free when its step has ended: `Gone`."""

    key: Key
    sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """Drop a PREFILL job whose blocks others may read: `Prefilled`, or still computed. Full blocks stay cached. Answered
    `Gone`."""

    key: Key


Command = Add | Loaded | Abort | Release


# --- events ---


@dataclass(frozen=True, slots=True)
class Reserved:
    """An AWAIT job has its blocks: `blocks[i]` holds positions [i*block_tokens, …) of `ids`, by group.

    The first `cached_blocks` of each group were found in the prefix index and need no fetch; the rest are FILLING.
    """

    key: Key
    groups: tuple[tuple[int, ...], ...]
    cached_blocks: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The pool has no room for this job and nothing may be evicted or preempted for it."""

    key: Key
    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """A chunk of the prompt was computed: `tokens` of `ids` so far, cached ones included.

    Of a PREFILL job that goes on, `groups` are the blocks that became full since the last one told, and `chain_hash` that of
    the last of them (hex): nobody writes them any more, so others may read them while the rest is computed. A cached
    prefix is told when the job starts.
    """

    key: Key
    tokens: int
    groups: tuple[GroupBlocks, ...] = ()
    chain_hash: str = ""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A PREFILL job is done; its blocks are held (one ref) until `Release` or `Abort`."""

    key: Key
    groups: tuple[GroupBlocks, ...]
    kv_tokens: int
    chain_hash: str
    index: int
    first_ids: tuple[int, ...]
    finishes: tuple[FinishReason, ...]
    logprobs: tuple[TokenLogprob, ...]  # empty unless asked for
    cached_tokens: int
    queue_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one sequence, one event a step. The tokens that came with `Add` or `Loaded` are not repeated: when
    they end a sequence, its event has no ids, only `finish`.

    `queue_s`, `prefill_s`, `first_step_s`, `cached_tokens` are set in the attempt's first event, else None and 0.
    """

    key: Key
    sequence: int
    first_index: int
    ids: tuple[int, ...]
    finish: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float = 0.0
    first_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Preempted:
    """The pool ran dry and this job gave way; all of its blocks are free again. A job whose prompt is still being
    computed here starts anew by itself instead, and nobody is told."""

    key: Key


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing of this job is left in the engine: after `Abort`, `Release`, or the last sequence's end."""

    key: Key


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine raised under this job; it is gone."""

    key: Key
    message: str


Event = Reserved | Rejected | Progress | Prefilled | TokenEvent | Preempted | Gone | Failed


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step, for metrics. Durations in seconds. Jobs that are not `counted` are in no number of tokens or jobs moved."""

    seconds: float
    prefill_tokens: int  # of prompts, and of answers that came with a job, computed in this step
    decode_tokens: int
    replayed_tokens: int  # computed again for one sequence of several: what its siblings' prompt left in a shared block
    samples: int  # rows that went through the output layer
    attended: int  # over all tokens computed, the positions that each attends to, as if every one saw the whole row
    context: int  # over all decode rows, the positions whose KV is read
    running: int
    waiting: int
    awaiting: int
    prefix_queries: int  # prompt tokens looked up, where a prompt is computed
    prefix_hits: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step (or one round of commands) gives: events in order, and counts."""

    events: tuple[Event, ...]
    stats: StepStats | None
    pool: PoolStats
    queued_tokens: int  # uncached prompt tokens waiting or running
