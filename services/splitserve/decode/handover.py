"""From KvReady to a sequence in the batch: await, copy, validate, release.

Whole blocks are copied while the rest of a long prompt is computed, what is left when its final handle is here. That may
come before the engine has reserved blocks to copy into, or while an early copy is under way: a job has one copy at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from splitserve.decode.effects import Command, Fetch, Fetched, FetchFailed
from splitserve.decode.endings import Endings
from splitserve.decode.job import Job
from splitserve.decode.matching import chain_hashes, difference, prompt_ids, proof, readable
from splitserve.decode.table import JobTable
from splitserve.engine import door
from splitserve.kv.transfer.base import BlockPair
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
        if job is None or job.state is not DecodeState.RESERVED or job.ready is not None:
            return []
        source = job.asked.source
        awaited = source is not None and (handle.owner, handle.incarnation, handle.pa) == (
            source.worker,
            source.incarnation,
            job.asked.pa,
        )
        if not awaited and self._desk.rules.guard_pa_awaited:
            return []
        if not ready.final:
            return self._early(job, ready, now)
        job.ready, job.ready_at = ready, now
        self.renew_at = min(self.renew_at, now + self._desk.limits.renew_s)
        if job.ended_by(ready):  # every first token ends its sequence: nothing to fetch
            job.take_first_tokens(ready)
            return [self._release(handle, ready.trace), *self._endings.settle(job, now)]
        return self._fetch(job, now)

    def _early(self, job: Job, ready: KvReady, now: float) -> list[Command]:
        """Whole blocks of a prompt that is still computed."""
        mine = self._desk.identity
        if ready.handle.fingerprint != mine.fingerprint:
            return []
        self._prove(job)
        if not readable(job, ready, mine.block_tokens):
            return []
        job.intake.offer(ready, mine.block_tokens)
        return self._fetch(job, now)

    def on_reserved(self, event: door.Reserved, job: Job, now: float) -> list[Command]:
        job.reserved = event
        self._prove(job)
        return self._fetch(job, now)

    def _prove(self, job: Job) -> None:
        """Compute the chain that a handle must have, while the prompt is computed elsewhere."""
        if not job.hashes:
            mine = self._desk.identity
            job.hashes = chain_hashes(prompt_ids(job), mine.block_tokens, mine.fingerprint, job.asked.cache_salt)

    def _fetch(self, job: Job, now: float) -> list[Command]:
        """Copy what can be copied, once there are blocks to copy into and no other copy of this job is under way."""
        ready, reserved = job.ready, job.reserved
        if reserved is None or job.intake.under_way or job.state is not DecodeState.RESERVED:
            return []
        if ready is not None:
            wrong = self._mismatch(job, ready, reserved)
            if wrong is not None:
                return self._kv_failed(job, FailReason.MISMATCH, wrong)
            job.intake.offer(ready, self._desk.identity.block_tokens)
            job.state = DecodeState.FETCHING
            job.handle_s = now - job.ready_at
        pairs, handle = job.intake.next_pairs(reserved, final=ready is not None), job.intake.handle
        if handle is None or not (pairs or ready):
            return []
        return [Fetch(job.key, handle, pairs, self._tokens(handle, pairs, final=ready is not None))]

    def _tokens(self, handle: KvHandle, pairs: tuple[BlockPair, ...], *, final: bool) -> int:
        """Tokens of the prompt in these blocks. All are full but the last one of a prompt, which is copied last."""
        count = sum(pair.group == handle.groups[0].group for pair in pairs)
        whole = count * self._desk.identity.block_tokens
        left = -handle.kv_tokens % self._desk.identity.block_tokens
        return whole - left if final and count else whole

    def _mismatch(self, job: Job, ready: KvReady, reserved: door.Reserved) -> str | None:
        mine = self._desk.identity
        if ready.handle.fingerprint != mine.fingerprint:
            return self._desk.mismatch(ready.handle.fingerprint)
        wrong = difference(job, ready, reserved, mine.block_tokens)
        if wrong is not None:
            return wrong
        chain = proof(job.hashes, len(job.hashes))
        return (
            None if chain == ready.handle.chain_hash else f"chain hash: here {chain}, there {ready.handle.chain_hash}"
        )

    def on_fetch_ended(self, event: Fetched | FetchFailed, now: float) -> list[Command]:
        if self._table.copying.pop(event.key, None) is not None:  # the job ended before its copy
            return [ToEngine(door.Abort(event.key))]
        job = self._table.at(event.key)
        if job is None or job.state not in (DecodeState.RESERVED, DecodeState.FETCHING) or not job.intake.under_way:
            return []
        if isinstance(event, FetchFailed):
            if self._desk.rules.validate_before_index:
                job.intake.failed()
                early = job.state is DecodeState.RESERVED
                return self._fetch(job, now) if early else self._kv_failed(job, event.reason, event.message)
            event = Fetched(event.key, 0, 0, "", 0.0)
        job.intake.arrived(event.bytes, event.blocks)
        if job.ready is None or job.state is DecodeState.RESERVED:
            return self._fetch(job, now)
        return self._loaded(job, job.ready, event, now)

    def _loaded(self, job: Job, ready: KvReady, event: Fetched, now: float) -> list[Command]:
        """All is here: into the batch. What the transfer took is what decode waited for: early copies cost no time."""
        first_ids = job.take_first_tokens(ready)
        job.state = DecodeState.READY
        loaded = KvLoaded(
            rid=job.asked.rid,
            worker=self._desk.identity.name,
            da=job.asked.da,
            pa=job.asked.pa,
            bytes=job.intake.bytes,
            blocks=job.intake.blocks,
            cached_tokens=job.reserved.cached_tokens if job.reserved else 0,
            transport=event.transport,
            handle_s=job.handle_s,
            transfer_s=event.seconds,
            trace=job.asked.trace,
        )
        unwanted = [ToEngine(door.Abort(job.key, n)) for n, sequence in enumerate(job.sequences) if not sequence.live]
        return [
            ToEngine(door.Loaded(job.key, ready.index, first_ids)),
            *unwanted,
            Publish(self._desk.subjects.router_events(job.asked.router), loaded),
            self._release(ready.handle, job.asked.trace),
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
        states = (DecodeState.RESERVED, DecodeState.FETCHING)
        waiting = [job for job in self._table if job.ready is not None and job.state in states]
        self.renew_at = now + self._desk.limits.renew_s if waiting else inf
        by_owner: dict[str, list[str]] = {}
        for job in waiting:
            if job.renew and job.ready is not None:
                by_owner.setdefault(job.ready.handle.owner, []).append(job.ready.handle.id)
        subject = self._desk.subjects.worker_lease
        return [Publish(subject(owner), Renew(tuple(ids)), reply=True) for owner, ids in by_owner.items()]
