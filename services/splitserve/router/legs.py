"""The two attempts of a request: which worker has it under which number, and the messages that say so."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from splitserve.protocol.handle import KvSource
from splitserve.protocol.messages import Amend, DecodeJob, PrefillJob
from splitserve.router.account import Life, Worker
from splitserve.router.generation import Submission

ASK_S = 0.5
AMEND_TRIES = 3


class JobKind(StrEnum):
    DECODE = "decode"
    AMEND = "amend"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class JobTag:
    """Names the question behind an answer: `number` is pa or da, `tries` counts repeats under the same number."""

    kind: JobKind
    rid: str
    number: int
    tries: int


@dataclass(slots=True)
class DecodeLeg:
    """A decode worker, asked or accepted. `pa`: the prefill it awaits, or the number that its own prefill took."""

    life: Life
    slot: int
    job: DecodeJob | Amend  # what it was last asked; the same again after an outage
    accepted: bool = False  # this very number
    held: bool = False  # any number: losing it counts
    tries: int = 1

    @property
    def da(self) -> int:
        return self.job.da

    @property
    def pa(self) -> int:
        return self.job.pa

    @property
    def local(self) -> bool:
        return self.job.source is None

    @property
    def tag(self) -> JobTag:
        kind = JobKind.AMEND if isinstance(self.job, Amend) else JobKind.DECODE
        return JobTag(kind, self.job.rid, self.da, self.tries)


@dataclass(slots=True)
class PrefillLeg:
    """A prefill worker. Planned while `job` is None: it is asked once decode has accepted.

    `base`: outputs when this number was taken; what decode is told, so that handle and reservation agree.
    """

    life: Life
    pa: int
    source: KvSource
    fingerprint: str
    base: tuple[tuple[int, ...], ...]
    job: PrefillJob | None = None
    accepted: bool = False
    tries: int = 1
    tokens_done: int = -1

    @property
    def key(self) -> str:
        """Names it among the worker's promises, beside the request id."""
        return f"pa{self.pa}"

    def tag(self, rid: str) -> JobTag:
        return JobTag(JobKind.PREFILL, rid, self.pa, self.tries)


def prefill_leg(worker: Worker, pa: int, base: tuple[tuple[int, ...], ...]) -> PrefillLeg:
    """A plan: this worker reads the prompt as `pa`, with what is out so far."""
    beat = worker.beat
    source = KvSource(beat.name, beat.incarnation, beat.addresses)
    return PrefillLeg(worker.life, pa, source, beat.fingerprint, base)


def prefill_ids(submission: Submission, base: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """What P reads: prompt and outputs; for n > 1 the prompt alone (decode replays the outputs)."""
    return submission.ids + base[0] if len(base) == 1 else submission.ids


def decode_job(
    submission: Submission,
    router: str,
    worker: Worker,
    *,
    da: int,
    pa: int,
    slot: int,
    source: KvSource | None,
    outputs: tuple[tuple[int, ...], ...],
    ttl_s: float,
) -> DecodeJob:
    return DecodeJob(
        rid=submission.rid,
        router=router,
        incarnation=worker.beat.incarnation,
        da=da,
        slot=slot,
        pa=pa,
        source=source,
        ids=submission.ids,
        outputs=outputs,
        params=submission.params,
        seeds=submission.seeds,
        fingerprint=worker.beat.fingerprint,
        ttl_s=ttl_s,
        priority=submission.priority,
        cache_salt=submission.cache_salt,
        trace=submission.trace,
    )


def prefill_job(
    submission: Submission, router: str, leg: PrefillLeg, notify: tuple[str, ...], ttl_s: float
) -> PrefillJob:
    return PrefillJob(
        rid=submission.rid,
        router=router,
        incarnation=leg.life[1],
        pa=leg.pa,
        ids=prefill_ids(submission, leg.base),
        prompt_len=len(submission.ids),
        params=submission.params,
        seeds=submission.seeds,
        notify=notify,
        fingerprint=leg.fingerprint,
        ttl_s=ttl_s,
        priority=submission.priority,
        cache_salt=submission.cache_salt,
        trace=submission.trace,
    )
