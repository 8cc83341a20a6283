"""Where a request goes: a pure function of the workers as known and the request (engine.md §3).

A decode worker is chosen by what it would still have to compute or fetch plus the context already promised to it, so
that a long cached prefix attracts and load repels (the cost of NVIDIA Dynamo's KV router, both weights 1). Then: read
the prompt there ("local") or on a prefill worker?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

BYTES_PER_S = 1e9  # of a data plane, until measured
HAND_OVER_S = 0.005
SHORT_CHUNKS = 10  # a decode worker reads a prompt of one chunk itself while it and what waits before it are no more
DELAYED = 0.1  # what each sequence that a chunk is read beside adds to its price: the chunk delays a token of each
MOVE = 0.9  # of the time that it still takes where a prompt waits: read elsewhere only if that takes no longer
LONG_CONTEXT = 512  # a moved sequence longer than this is not recomputed on a decode batch (D13)


class Split(StrEnum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Why(StrEnum):
    """Why a prompt is read where it is."""

    ASKED = "asked"  # by --split, or the request
    NO_PREFILL_WORKER = "no_prefill_worker"
    LONG_CONTEXT = "long_context"  # a moved sequence
    IDLE = "idle"  # the decode worker has nothing else to do
    SHORT = "short"  # one chunk of the decode worker, and little before it
    FASTER = "faster"  # by the estimate


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker, as placement sees it for one request."""

    name: str
    fingerprint: str
    factors: tuple[tuple[str, str], ...]
    cached_tokens: int  # of this request's context, as far as we remember
    queued_tokens: int  # prompt tokens before it, not yet read
    context: int  # tokens of context promised there
    idle: bool
    room: bool
    placed: int
    rate: float  # prompt tokens a second; of a decode worker that is not idle, beside its decodes
    chunk_tokens: int
    bytes_per_token: int
    running: int = 0  # sequences in its batch, by its last beat


@dataclass(frozen=True, slots=True)
class Need:
    """What is to be placed. `tokens`: context to be computed, prompt and outputs. `moved`: it was placed before."""

    tokens: int
    split: Split
    moved: bool = False
    last: str = ""  # asked last: it has just given this request up


@dataclass(frozen=True, slots=True)
class Placed:
    """`prefill` None: the decode worker reads the prompt itself."""

    decode: str
    prefill: str | None
    why: Why
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class NotPlaced:
    """Nobody now. `for_good`: waiting does not help. `full`: no decode worker has room, so those behind wait too."""

    reason: str
    for_good: bool = False
    full: bool = False


def place(need: Need, decodes: Sequence[Candidate], prefills: Sequence[Candidate]) -> Placed | NotPlaced:
    """Choose a decode worker and how the prompt is read."""
    decode = choose_decode(need, decodes)
    if decode is None:
        return no_decode(decodes)
    matching = [p for p in prefills if p.fingerprint == decode.fingerprint]
    prefill = choose_prefill(need, matching)
    if prefill is None and need.split is Split.ALWAYS:
        if prefills and not matching:
            return NotPlaced(difference(decode, prefills[0]), for_good=True)
        return NotPlaced("no prefill worker has room, and --split is always")
    remote, why = _how(need, decode, prefill)
    chosen = prefill if remote and prefill is not None else None
    return Placed(decode.name, chosen.name if chosen else None, why, (chosen or decode).cached_tokens)


def no_decode(decodes: Sequence[Candidate]) -> NotPlaced:
    return NotPlaced("no decode worker has room" if decodes else "no decode worker can be asked", full=bool(decodes))


def choose_decode(need: Need, decodes: Sequence[Candidate]) -> Candidate | None:
    return min(
        (d for d in decodes if d.room),
        key=lambda d: (d.name == need.last, need.tokens - d.cached_tokens + d.context, d.placed, d.name),
        default=None,
    )


def choose_prefill(need: Need, prefills: Sequence[Candidate]) -> Candidate | None:
    return min(
        (p for p in prefills if p.room),
        key=lambda p: (p.queued_tokens + need.tokens - p.cached_tokens, p.placed, p.name),
        default=None,
    )


def _how(need: Need, decode: Candidate, prefill: Candidate | None) -> tuple[bool, Why]:
    """(remote?, why)."""
    if prefill is None:
        return False, Why.NO_PREFILL_WORKER
    if need.split is not Split.AUTO:
        return need.split is Split.ALWAYS, Why.ASKED
    if need.moved and need.tokens > LONG_CONTEXT:
        return True, Why.LONG_CONTEXT
    if decode.idle:
        return False, Why.IDLE
    if _short(need, decode):
        return False, Why.SHORT
    return _read_s(need, prefill, decode) <= _read_s(need, decode, decode), Why.FASTER


def _short(need: Need, decode: Candidate) -> bool:
    """A prompt of one chunk, and little before it: its hand-over would cost more than it delays."""
    uncached = need.tokens - decode.cached_tokens
    return uncached <= decode.chunk_tokens and decode.queued_tokens + uncached <= SHORT_CHUNKS * decode.chunk_tokens


def sooner(need: Need, here: Candidate, there: Candidate, decode: Candidate) -> bool:
    """Whether a prompt that waits at `here`, behind its `queued_tokens`, is better read at `there`."""
    local = there.name == decode.name  # it has room: the answer's is kept there
    if need.split is (Split.ALWAYS if local else Split.NEVER):
        return False
    if not local and not (there.room and there.fingerprint == decode.fingerprint):
        return False
    if here.name == decode.name and _short(need, here):
        return False
    return _read_s(need, there, decode) <= MOVE * _read_s(need, here, decode)


def _read_s(need: Need, reader: Candidate, decode: Candidate) -> float:
    """Seconds until the prompt is read and its KV where it is decoded, with the price of what that delays there."""
    seconds = (reader.queued_tokens + need.tokens - reader.cached_tokens) / reader.rate
    if reader.name == decode.name:
        return (1 + DELAYED * decode.running) * seconds
    return seconds + (need.tokens - decode.cached_tokens) * decode.bytes_per_token / BYTES_PER_S + HAND_OVER_S


def difference(one: Candidate, other: Candidate) -> str:
    """Which factor of two fingerprints differs, in words."""
    theirs = dict(other.factors)
    for factor, value in one.factors:
        if theirs.get(factor) != value:
            return f"{one.name} and {other.name} differ in {factor}: {value} and {theirs.get(factor, 'nothing')}"
    return f"{one.name} and {other.name} have other fingerprints: {one.fingerprint[:12]} and {other.fingerprint[:12]}"
