"""What a prefill and a decode worker's core do alike: fences, tombstones, routers, beats, digests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from splitserve.kv.fingerprint import Factors, differing_factor
from splitserve.protocol.effects import Answer, Publish
from splitserve.protocol.messages import (
    Amend,
    Beat,
    DecodeJob,
    Digest,
    DigestRow,
    FinAck,
    Message,
    Pong,
    PrefillJob,
    Refused,
    Resume,
)
from splitserve.protocol.states import RefuseReason, Role
from splitserve.protocol.subjects import Subjects
from splitserve.worker.effects import Identity
from splitserve.worker.routers import Routers
from splitserve.worker.rules import Limits, Rules
from splitserve.worker.tombstones import Tombstones

_NAMES_ITS_ROUTER = (DecodeJob, PrefillJob, Amend, Resume, FinAck)
_FINGERPRINTS_KEPT = 64


@dataclass(frozen=True, slots=True)
class Load:
    """What a beat says of a core's load. Blocks, tokens, sequences."""

    free_blocks: int
    promised_blocks: int
    queued_tokens: int
    running: int
    waiting: int


@dataclass(slots=True)
class Desk:
    """`identity`, `subjects`, `limits` and `rules` are the core's; the rest is this life's memory of others."""

    role: Role
    identity: Identity
    subjects: Subjects
    limits: Limits
    rules: Rules
    draining: bool = False
    refused: Counter[RefuseReason] = field(default_factory=Counter[RefuseReason])  # answers, for metrics
    routers: Routers = field(init=False)
    tombstones: Tombstones = field(init=False)
    _factors: dict[str, Factors] = field(default_factory=dict[str, Factors])

    def __post_init__(self) -> None:
        self.routers = Routers(self.limits)
        self.tombstones = Tombstones(self.limits.tombstone_s, self.limits.tombstones if self.rules.tombstones else 0)

    def observe(self, message: Message, now: float) -> None:
        """Take from a message who is alive."""
        if isinstance(message, Beat):
            if (message.name, message.incarnation) == (self.identity.name, self.identity.incarnation):
                self.routers.own_beat(now)
            elif message.role == Role.ROUTER:
                self.routers.beat(message.life or message.name, now)
            elif message.fingerprint and len(self._factors) < _FINGERPRINTS_KEPT:
                self._factors.setdefault(message.fingerprint, message.fingerprint_factors)
        elif isinstance(message, _NAMES_ITS_ROUTER):
            self.routers.heard(message.router, now)

    def pong(self, reply_to: str | None) -> list[Answer]:
        """Whatever life was asked for: the answer names the one that lives."""
        return [] if reply_to is None else [Answer(reply_to, Pong(self.identity.incarnation))]

    def stale(self, incarnation: int) -> Refused | None:
        """A refusal by name, if the message was meant for another life of this worker."""
        mine = self.identity.incarnation
        if incarnation == mine or not self.rules.stale_incarnation:
            return None
        return self.refuse(
            RefuseReason.STALE_INCARNATION,
            f"{self.identity.name} lives as incarnation {mine:x}, the message was for {incarnation:x}",
        )

    def ended(self, rid: str, attempt: int) -> Refused | None:
        """The refusal of an attempt that is over: the one it got, or that it ended."""
        mark = self.tombstones.over(rid, attempt)
        if mark is None:
            return None
        if mark.refused is not None and mark.attempt == attempt:
            return mark.refused
        return self.lower(attempt, mark.attempt + 1)

    def lower(self, attempt: int, lowest: int) -> Refused:
        return self.refuse(
            RefuseReason.STALE_ATTEMPT, f"attempt {attempt} is over here; {lowest} is the lowest that may run"
        )

    def unfit(self, fingerprint: str, tokens: int, *, new: bool = True) -> Refused | None:
        """A refusal of any job that this worker cannot take, whatever its load; `new` ones not while draining."""
        mine = self.identity
        if self.draining and new:
            return self.refuse(RefuseReason.DRAINING, f"{mine.name} is draining")
        if fingerprint != mine.fingerprint:
            return self.refuse(RefuseReason.MISMATCH, self.mismatch(fingerprint))
        if tokens > mine.max_model_len:
            return self.refuse(
                RefuseReason.TOO_LONG, f"{tokens} tokens are over the {mine.max_model_len} of {mine.model}"
            )
        return None

    def mismatch(self, fingerprint: str) -> str:
        """One line that names the factor in which `fingerprint` differs from ours, if its bearer was ever heard."""
        theirs = self._factors.get(fingerprint)
        factor = differing_factor(self.identity.fingerprint_factors, theirs) if theirs else None
        return factor or f"fingerprint: here {self.identity.fingerprint!r}, there {fingerprint!r}"

    def refuse(self, reason: RefuseReason, message: str) -> Refused:
        self.refused[reason] += 1
        return Refused(reason, message, self.limits.retry_ms)

    def digest(self, router: str, stream_seq: int, rows: Iterable[DigestRow]) -> Publish:
        mine = self.identity
        digest = Digest(mine.name, self.role, mine.incarnation, stream_seq, tuple(rows))
        return Publish(self.subjects.router_events(router), digest)

    def beat(self, load: Load, step_age_ms: int, bus_lag_ms: int) -> Beat:
        mine = self.identity
        return Beat(
            name=mine.name,
            role=self.role,
            incarnation=mine.incarnation,
            model=mine.model,
            fingerprint=mine.fingerprint,
            fingerprint_factors=mine.fingerprint_factors,
            block_tokens=mine.block_tokens,
            max_model_len=mine.max_model_len,
            total_blocks=mine.total_blocks,
            free_blocks=load.free_blocks,
            promised_blocks=load.promised_blocks,
            queued_tokens=load.queued_tokens,
            running=load.running,
            waiting=load.waiting,
            chunk_tokens=mine.chunk_tokens,
            bytes_per_token=mine.bytes_per_token,
            step_age_ms=step_age_ms,
            bus_lag_ms=bus_lag_ms,
            addresses=mine.addresses,
            draining=self.draining,
            metrics_url=mine.metrics_url,
        )
