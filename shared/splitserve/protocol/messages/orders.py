"""Router -> worker, `w.<wid>.in`, and the answers. One subject, so that a cancel cannot overtake its job.

`incarnation` is the life of the worker that a message is meant for; another life refuses it by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.protocol.handle import KvSource
from splitserve.protocol.messages.columns import U4, U8, U4Lists
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import RefuseReason
from splitserve.protocol.trace import NO_TRACE, Trace


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
    trace: Trace = NO_TRACE


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
    trace: Trace = NO_TRACE


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
    trace: Trace = NO_TRACE


@dataclass(frozen=True, slots=True)
class Cancel:
    """End every attempt of `rid` up to and including `pa` (at a prefill worker) or `da` (at a decode worker)."""

    rid: str
    incarnation: int
    pa: int
    da: int
    reason: str
    trace: Trace = NO_TRACE


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
