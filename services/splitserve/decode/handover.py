"""From KvReady to a sequence in the batch: await, copy, validate, release.

The handle may come before the engine has reserved blocks to copy into; the fetch begins when both are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from splitserve.decode.effects import Command, Fetch, Fetched, FetchFailed
from splitserve.decode.endings import Endings
from splitserve.decode.job import Job
from splitserve.decode.matching import chain_hash, difference, pairs_of, prompt_ids
from splitserve.decode.table import JobTable
from splitserve.engine import door
from splitserve.protocol.effects import Ask, Publish, Unanswered
from splitserve.protocol.handle import KvHandle
from splitserve.protocol.messages import KvFailed, KvLoaded, KvReady, Release, Renew, RenewAnswer
from splitserve.protocol.states import DecodeState, FailReason
from splitserve.protocol.trace import TraceContext
from splitserve.worker.desk import Desk
from splitserve.worker.effects import ToEngine


@dataclass(frozen=True, slots=True)
class ReleaseTag:
    """Which handle an `Ask` releases, and how often it may still be asked."""

    handle: KvHandle
    trace: TraceContext
    tries_left: int


class Handover:
    """The part of the decode core that takes KV from others."""

    def __init__(self, desk: Desk, table: JobTable, endings: Endings) -> None:
        self._desk = desk
        self._table = table
        self._endings = endings
        self.renew_at = inf

    def on_kv_ready(self, ready: KvReady, _reply_to: str | None, now: float) -> list[Command]:
        handle = ready.handle
        job = self._table.get(handle.rid)
        if job is None or job.state is not DecodeState.RESERVED or job.ready is not None or not ready.final:
            return []
        source = job.asked.source
        awaited = source is not None and (handle.owner, handle.incarnation, handle.pa) == (
            source.worker,
            source.incarnation,
            job.asked.pa,
        )
        if not awaited and self._desk.rules.guard_pa_awaited:
            return []
        job.ready, job.ready_at = ready, now
        if job.ended_by(ready):  # every first token ends its sequence: nothing to fetch
            job.take_first_tokens(ready)
            return [self._release(handle, ready.trace), *self._endings.settle(job, now)]
        return self._fetch(job, now)

    def on_reserved(self, event: door.Reserved, job: Job, now: float) -> list[Command]:
        job.reserved = event
        return self._fetch(job, now)

    def _fetch(self, job: Job, now: float) -> list[Command]:
        """Begin once both are here: the handle and the blocks to copy into."""
        ready, reserved = job.ready, job.reserved
        if ready is None or reserved is None or job.state is not DecodeState.RESERVED:
            return []
        wrong = self._mismatch(job, ready, reserved)
        if wrong is not None:
            return self._kv_failed(job, FailReason.MISMATCH, wrong)
        job.state = DecodeState.FETCHING
        job.handle_s = now - job.ready_at
        self.renew_at = min(self.renew_at, now + self._desk.limits.renew_s)
        return [Fetch(job.key, ready.handle, pairs_of(ready.handle, reserved))]

    def _mismatch(self, job: Job, ready: KvReady, reserved: door.Reserved) -> str | None:
        mine = self._desk.identity
        if ready.handle.fingerprint != mine.fingerprint:
            return self._desk.mismatch(ready.handle.fingerprint)
        wrong = difference(job, ready, reserved, mine.block_tokens)
        if wrong is not None:
            return wrong
        chain = chain_hash(prompt_ids(job), mine.block_tokens, mine.fingerprint, job.asked.cache_salt)
        return (
            None if chain == ready.handle.chain_hash else f"chain hash: here {chain}, there {ready.handle.chain_hash}"
        )

    def on_fetch_ended(self, event: Fetched | FetchFailed, now: float) -> list[Command]:
        if self._table.copying.pop(event.key, None) is not None:  # the job ended before its copy
            return [ToEngine(door.Abort(event.key))]
        job = self._table.at(event.key)
        if job is None or job.ready is None or job.state is not DecodeState.FETCHING:
            return []
        if isinstance(event, FetchFailed):
            if self._desk.rules.validate_before_index:
                return self._kv_failed(job, event.reason, event.message)
            event = Fetched(event.key, 0, 0, "", 0.0)
        first_ids = job.take_first_tokens(job.ready)
        job.state = DecodeState.READY
        loaded = KvLoaded(
            rid=job.asked.rid,
            worker=self._desk.identity.name,
            da=job.asked.da,
            pa=job.asked.pa,
            bytes=event.bytes,
            blocks=event.blocks,
            cached_tokens=job.reserved.cached_tokens if job.reserved else 0,
            transport=event.transport,
            handle_s=job.handle_s,
            transfer_s=event.seconds,
            trace=job.asked.trace,
        )
        unwanted = [ToEngine(door.Abort(job.key, n)) for n, sequence in enumerate(job.sequences) if not sequence.live]
        return [
            ToEngine(door.Loaded(job.key, job.ready.index, first_ids)),
            *unwanted,
            Publish(self._desk.subjects.router_events(job.asked.router), loaded),
            self._release(job.ready.handle, job.asked.trace),
            *self._endings.settle(job, now),
        ]

    def _kv_failed(self, job: Job, reason: FailReason, message: str) -> list[Command]:
        """The blocks are given back, the promise stays: the router amends, or cancels."""
        job.state = DecodeState.FAILED
        asked = job.asked
        failed = KvFailed(asked.rid, self._desk.identity.name, asked.da, asked.pa, reason, message, asked.trace)
        return [*self._endings.stop(job), Publish(self._desk.subjects.router_events(asked.router), failed)]

    def _release(self, handle: KvHandle, trace: TraceContext, tries_left: int | None = None) -> Ask:
        tries = self._desk.limits.release_tries if tries_left is None else tries_left
        return Ask(
            self._desk.subjects.worker_lease(handle.owner),
            Release(handle.id, handle.token, trace),
            self._desk.limits.release_timeout_s,
            ReleaseTag(handle, trace, tries - 1),
        )

    def on_unanswered(self, event: Unanswered, _now: float) -> list[Command]:
        tag = event.tag
        again = isinstance(tag, ReleaseTag) and tag.tries_left
        return [self._release(tag.handle, tag.trace, tag.tries_left)] if again else []

    def on_renew_answer(self, answer: RenewAnswer, _reply_to: str | None, _now: float) -> list[Command]:
        unknown = frozenset(answer.unknown)
        for job in self._table:
            if job.ready is not None and job.ready.handle.id in unknown:
                job.renew = False
        return []

    def renew(self, now: float) -> list[Command]:
        """Keep the leases of what is being copied, one message an owner."""
        if now < self.renew_at:
            return []
        fetching = [job for job in self._table if job.state is DecodeState.FETCHING]
        self.renew_at = now + self._desk.limits.renew_s if fetching else inf
        by_owner: dict[str, list[str]] = {}
        for job in fetching:
            if job.renew and job.ready is not None:
                by_owner.setdefault(job.ready.handle.owner, []).append(job.ready.handle.id)
        subject = self._desk.subjects.worker_lease
        return [Publish(subject(owner), Renew(tuple(ids)), reply=True) for owner, ids in by_owner.items()]
