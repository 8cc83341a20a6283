"""From prefill to decode: the KV is ready, loaded, failed, and the lease that holds it meanwhile (`w.<wid>.lease`)."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.protocol.handle import KvHandle
from splitserve.protocol.params import TokenLogprob
from splitserve.protocol.states import FailReason
from splitserve.protocol.trace import NO_TRACE, Trace


@dataclass(frozen=True, slots=True)
class PrefillDurations:
    """Seconds, measured inside the prefill worker."""

    queue_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class KvReady:
    """KV of positions [0, tokens_ready) is readable.

    `final`: that is the whole prompt, and the first tokens are sampled; `first_ids[i]` is sequence i's token at `index`.
    Before, while the prompt is computed, the handle names only the whole blocks that have become readable since the
    message before; they end at `tokens_ready`, and there are no tokens. Such a message may be lost: the final one names
    all blocks.
    """

    handle: KvHandle
    tokens_ready: int
    final: bool
    index: int
    first_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # empty unless asked for
    cached_tokens: int
    durations: PrefillDurations
    finishes: tuple[int, ...] = ()  # FinishReason of each first token
    trace: Trace = NO_TRACE


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
    trace: Trace = NO_TRACE


@dataclass(frozen=True, slots=True)
class KvFailed:
    rid: str
    worker: str
    da: int
    pa: int
    reason: FailReason
    message: str
    trace: Trace = NO_TRACE


@dataclass(frozen=True, slots=True)
class Release:
    """Drop the lease now. Answered ReleaseAnswer."""

    handle_id: str
    token: str
    trace: Trace = NO_TRACE


@dataclass(frozen=True, slots=True)
class Renew:
    """expiry = max(old, now + ttl) for each handle. Answered RenewAnswer on the reply subject."""

    handle_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReleaseAnswer:
    """Whether the handle was still held."""

    known: bool


@dataclass(frozen=True, slots=True)
class RenewAnswer:
    """Handles that this owner does not hold (any more): stop renewing them. A hint only; generations decide."""

    unknown: tuple[str, ...]
