"""A prefill worker's jobs: queued -> running -> held under a lease -> freed. Decides only; `service` acts.

The lease is the one thing that outlives the computation: from `KvReady` on nobody writes the blocks, and they are freed
by release, cancel or the lease's end, each of which leaves a tombstone. A prompt of several chunks is under a lease, its
whole blocks readable, from its first one on; decode hears of each, the router only of the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf
from typing import Any

from splitserve.engine import door
from splitserve.kv.lease import LeaseTable
from splitserve.prefill.job import Handles, Job, Key, random_token
from splitserve.protocol.effects import Answer, BusDown, Drain, Publish, Received
from splitserve.protocol.messages import (
    Accepted,
    Beat,
    Cancel,
    Ping,
    PrefillJob,
    Refused,
    Release,
    ReleaseAnswer,
    Renew,
    RenewAnswer,
    Resume,
    ResumeAnswer,
)
from splitserve.protocol.states import PrefillState, RefuseReason, Role
from splitserve.protocol.subjects import Subjects
from splitserve.worker.desk import Desk, Load
from splitserve.worker.effects import EngineBatch, Identity, ToEngine
from splitserve.worker.rules import Limits, Rules

Command = Publish | Answer | ToEngine


class PrefillJobs:
    """The core. `leases` is shared with the data plane, which pins in it; after an unpin the shell sends `Tick`."""

    def __init__(
        self,
        identity: Identity,
        subjects: Subjects,
        limits: Limits = Limits(),  # noqa: B008  # frozen
        rules: Rules = Rules(),  # noqa: B008
        *,
        new_token: Callable[[], str] = random_token,
        leases: LeaseTable | None = None,
    ) -> None:
        self.leases = LeaseTable() if leases is None else leases
        self._desk = Desk(Role.PREFILL, identity, subjects, limits, rules)
        self._limits = limits
        self._rules = rules
        self._jobs: dict[str, Job] = {}
        self._pool = door.PoolStats(identity.total_blocks, identity.total_blocks, 0, 0, 0)
        early_s = inf if rules.hold_while_computing else limits.lease_ttl_s
        self._handles = Handles(identity, self.leases, limits.lease_ttl_s, new_token, early_s)
        self._on_message: dict[type, Callable[[Any, str | None, float], list[Command]]] = {
            PrefillJob: self._on_job,
            Cancel: self._on_cancel,
            Release: self._on_release,
            Renew: self._on_renew,
            Resume: self._on_resume,
            Ping: lambda ping, reply_to, _now: list(self._desk.pong(reply_to)),
        }
        self._on_engine: dict[type, Callable[[Any, Job, float], list[Command]]] = {
            door.Progress: self._on_progress,
            door.Prefilled: self._on_prefilled,
            door.Rejected: self._on_lost,
            door.Preempted: self._on_lost,
            door.Failed: self._on_lost,
        }

    # --- the core's three methods, and what its shell shows ---

    def handle(self, event: object, now: float) -> list[Command]:
        """Total: an event that is not ours, or late, gives nothing."""
        commands = self._on_time(now)  # first: a waking worker must not act on what is over
        match event:
            case Received(message, reply_to):
                self._desk.observe(message, now)
                handler = self._on_message.get(type(message))
                if handler is not None:
                    commands += handler(message, reply_to, now)
            case EngineBatch(batch):
                self._pool = batch.pool
                for happened in batch.events:
                    commands += self._engine_event(happened, now)
            case BusDown():
                self._desk.routers.bus_down()
            case Drain():
                self._desk.draining = True
            case _:
                pass
        return commands

    def wake_at(self) -> float | None:
        times = [job.deadline for job in self._jobs.values()]
        times += [
            at
            for at in (self.leases.next_expiry(), self._desk.tombstones.next_expiry(), self._desk.routers.next_at())
            if at is not None
        ]
        return min(times, default=None)

    def beat(self, now: float, step_age_ms: int = 0, bus_lag_ms: int = 0) -> Beat:
        free = self._pool.free + self._pool.cached
        load = Load(free, self.promised_blocks, self.queued_tokens, self.running, self.waiting)
        return self._desk.beat(load, step_age_ms, bus_lag_ms)

    @property
    def idle(self) -> bool:
        """Nothing queued, running or held: a draining worker may leave."""
        return not self._jobs and not len(self.leases)

    @property
    def draining(self) -> bool:
        return self._desk.draining

    @property
    def refused(self) -> Counter[RefuseReason]:
        """Jobs and messages that were not taken, by reason."""
        return self._desk.refused

    @property
    def running(self) -> int:
        """Prompts that are being computed."""
        return sum(job.state is PrefillState.RUNNING for job in self._jobs.values())

    @property
    def waiting(self) -> int:
        """Prompts that are not begun."""
        return sum(job.state is PrefillState.QUEUED for job in self._jobs.values())

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed. A cached prefix counts until its job is begun."""
        return sum(job.tokens_left for job in self._jobs.values())

    @property
    def promised_blocks(self) -> int:
        """Blocks that accepted jobs need or hold. One that two prompts share counts twice."""
        return sum(job.blocks_unheld for job in self._jobs.values()) + self.leases.held_blocks

    # --- time ---

    def _on_time(self, now: float) -> list[Command]:
        desk = self._desk
        desk.tombstones.expire(now)
        commands = self._free_leases(now)
        for job in [job for job in self._jobs.values() if job.deadline <= now]:
            commands += self._end(job, now)
        for router in desk.routers.silent(now):
            for job in [job for job in self._jobs.values() if job.asked.router == router]:
                commands += self._end(job, now)
        return commands + [self._digest(router) for router in desk.routers.digests_due(now)]

    def _free_leases(self, now: float) -> list[Command]:
        """End what is over by the owner's clock, free what nobody reads any more."""
        at = self.leases.next_expiry()
        if at is None or at > now:
            return []
        freed = [ToEngine(door.Release(key)) for key in self.leases.expire(now)]
        for job in list(self._jobs.values()):
            if job.handle is not None and not self._handles.holds(job.handle):
                self._forget(job, now)
        return list(freed)

    def _digest(self, router: str) -> Publish:
        return self._desk.digest(router, 0, (job.row() for job in self._jobs.values() if job.asked.router == router))

    # --- messages ---

    def _on_job(self, asked: PrefillJob, reply_to: str | None, now: float) -> list[Command]:
        stale = self._desk.stale(asked.incarnation)
        answer, commands = (stale, list[Command]()) if stale is not None else self._take(asked, now)
        return commands if reply_to is None else [Answer(reply_to, answer), *commands]

    def _take(self, asked: PrefillJob, now: float) -> tuple[Accepted | Refused, list[Command]]:
        job = self._jobs.get(asked.rid)
        if job is not None and asked.pa == job.asked.pa and self._rules.same_number_same_answer:
            return job.answer, []
        if job is not None and asked.pa < job.asked.pa:
            return self._desk.lower(asked.pa, job.asked.pa), []
        ended = self._desk.ended(asked.rid, asked.pa)
        if ended is not None:
            return ended, []
        commands = self._end(job, now) if job is not None else []
        blocks = -(-len(asked.ids) // self._desk.identity.block_tokens)
        refused = self._refusal(asked, blocks)
        if refused is not None:
            self._desk.tombstones.put(asked.rid, asked.pa, now, refused)
            return refused, commands
        answer = Accepted(reserved_blocks=blocks, queue_tokens=self.queued_tokens)
        job = self._jobs[asked.rid] = Job(asked, answer, now + asked.ttl_s, blocks)
        return answer, [*commands, ToEngine(job.addition)]

    def _refusal(self, asked: PrefillJob, blocks: int) -> Refused | None:
        desk, total = self._desk, self._desk.identity.total_blocks
        unfit = desk.unfit(asked.fingerprint, len(asked.ids))
        if unfit is not None or not self._rules.promise:
            return unfit
        if blocks > total:
            return desk.refuse(RefuseReason.TOO_LONG, f"{blocks} blocks are more than the pool's {total}")
        promised = self.promised_blocks
        if promised + blocks > total:
            return desk.refuse(RefuseReason.FULL, f"{blocks} blocks beside {promised} promised of {total}")
        queued, limit = self.queued_tokens, self._limits.queued_tokens
        if queued and queued + len(asked.ids) > limit:
            return desk.refuse(
                RefuseReason.FULL, f"{len(asked.ids)} tokens behind {queued} queued, the limit is {limit}"
            )
        return None

    def _on_cancel(self, cancel: Cancel, _reply_to: str | None, now: float) -> list[Command]:
        if self._desk.stale(cancel.incarnation) is not None:
            return []
        job = self._jobs.get(cancel.rid)
        commands = self._end(job, now) if job is not None and job.asked.pa <= cancel.pa else []
        self._desk.tombstones.put(cancel.rid, cancel.pa, now)
        return commands

    def _on_release(self, release: Release, reply_to: str | None, now: float) -> list[Command]:
        known = self.leases.release(release.handle_id, release.token)
        if known:
            for job in [j for j in self._jobs.values() if j.handle and j.handle.id == release.handle_id]:
                self._forget(job, now)  # pinned blocks are freed later, the lease is over now
        commands = self._free_leases(now)
        return commands if reply_to is None else [Answer(reply_to, ReleaseAnswer(known)), *commands]

    def _on_renew(self, renew: Renew, reply_to: str | None, now: float) -> list[Command]:
        unknown = self.leases.renew(renew.handle_ids, now)
        return [] if reply_to is None else [Answer(reply_to, RenewAnswer(unknown))]

    def _on_resume(self, resume: Resume, reply_to: str | None, _now: float) -> list[Command]:
        answer = self._desk.stale(resume.incarnation)
        commands: list[Command] = []
        if answer is None:
            unknown: list[Key] = []
            for row in resume.rows:
                job = self._jobs.get(row.rid)
                if job is None or job.asked.pa != row.attempt:
                    unknown.append((row.rid, row.attempt))
                else:
                    commands += self._announce(job)
            answer = ResumeAnswer(tuple(unknown))
        return commands if reply_to is None else [Answer(reply_to, answer), *commands]

    # --- the engine ---

    def _engine_event(self, event: door.Event, now: float) -> list[Command]:
        handler = self._on_engine.get(type(event))
        if handler is None or not isinstance(event.key, tuple):
            return []
        rid, pa = event.key
        job = self._jobs.get(rid)
        if job is None or job.asked.pa != pa:  # ended here, the engine will say so too
            return []
        return handler(event, job, now)

    def _on_progress(self, event: door.Progress, job: Job, now: float) -> list[Command]:
        if job.state is PrefillState.HELD:
            return []
        job.state = PrefillState.RUNNING
        job.computed = event.tokens
        if not event.groups:
            return []
        early, router = self._handles.early(job, event, now), self._desk.subjects.router_events(job.asked.router)
        return [Publish(subject, early) for subject in job.asked.notify if subject != router]

    def _on_prefilled(self, event: door.Prefilled, job: Job, now: float) -> list[Command]:
        job.state = PrefillState.HELD
        job.computed = event.kv_tokens
        job.ready = self._handles.hold(job, event, now)
        return self._announce(job)

    def _on_lost(self, _event: object, job: Job, now: float) -> list[Command]:
        """The engine gave it up. There is no message for that: a digest without it says so, and need not be late."""
        self._forget(job, now)
        if job.handle is not None:
            self.leases.end(job.handle.id)
        return [*self._free_leases(now), self._digest(job.asked.router)]

    # --- ends ---

    def _announce(self, job: Job) -> list[Command]:
        ready = job.ready
        return [] if ready is None else [Publish(subject, ready) for subject in job.asked.notify]

    def _end(self, job: Job, now: float) -> list[Command]:
        """Drop a job in whatever state it is."""
        self._forget(job, now)
        if job.handle is None:
            return [ToEngine(door.Abort(job.key))]
        self.leases.end(job.handle.id)
        return self._free_leases(now)

    def _forget(self, job: Job, now: float) -> None:
        del self._jobs[job.asked.rid]
        self._desk.tombstones.put(job.asked.rid, job.asked.pa, now)
