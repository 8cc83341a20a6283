"""A decode worker's jobs: reserved -> fetching -> ready -> running -> done. Decides only; `service` acts.

Three things end apart and are kept apart: a job ends when nobody wants it, its copy when the reader says so, its blocks
when both have. Blocks that a fetch still writes are therefore aborted in the engine only behind `Fetched` or `FetchFailed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf
from typing import Any

from splitserve.decode.effects import Attach, Command, Fetched, FetchFailed, Key
from splitserve.decode.endings import Endings
from splitserve.decode.handover import Handover
from splitserve.decode.job import Job, fresh_sequences, promised_blocks
from splitserve.decode.matching import prompt_ids
from splitserve.decode.steps import Steps
from splitserve.decode.table import JobTable
from splitserve.engine import door
from splitserve.protocol.effects import Answer, BusDown, Drain, Received, Unanswered
from splitserve.protocol.messages import (
    Accepted,
    Amend,
    Beat,
    Cancel,
    DecodeJob,
    FinAck,
    KvReady,
    Message,
    Ping,
    Refused,
    RenewAnswer,
    Resume,
    ResumeAnswer,
)
from splitserve.protocol.states import DecodeState, RefuseReason, Role, is_probe
from splitserve.protocol.subjects import Subjects
from splitserve.worker.desk import Desk, Load
from splitserve.worker.effects import EngineBatch, Identity, ToEngine
from splitserve.worker.frames import Frames
from splitserve.worker.rules import Limits, Rules


class DecodeJobs:
    """The core. `_handover` takes KV from others, `_steps` hears the engine, `_endings` ends jobs; this class takes them."""

    def __init__(
        self,
        identity: Identity,
        subjects: Subjects,
        limits: Limits = Limits(),  # noqa: B008  # frozen
        rules: Rules = Rules(),  # noqa: B008
    ) -> None:
        self._desk = Desk(Role.DECODE, identity, subjects, limits, rules)
        self._limits = limits
        self._rules = rules
        self._table = JobTable(identity.block_tokens, limits.promise_tokens)
        self._frames = Frames(identity.name, identity.incarnation, subjects, limits.frame_tokens)
        self._pool = door.PoolStats(identity.total_blocks, identity.total_blocks, 0, 0, 0)
        self._endings = Endings(self._desk, self._table)
        self._steps = Steps(self._desk, self._frames, self._endings)
        self._handover = Handover(self._desk, self._table, self._endings)
        self._on_event: dict[type, Callable[[Any, float], list[Command]]] = {
            Received: self._on_received,
            EngineBatch: self._on_batch,
            Fetched: self._handover.on_fetch_ended,
            FetchFailed: self._handover.on_fetch_ended,
            Unanswered: self._handover.on_unanswered,
            BusDown: lambda _event, _now: self._desk.routers.bus_down() or [],
            Drain: self._on_drain,
        }
        self._on_message: dict[type, Callable[[Any, str | None, float], list[Command]]] = {
            DecodeJob: self._on_job,
            Amend: self._on_amend,
            Cancel: self._on_cancel,
            KvReady: self._handover.on_kv_ready,
            Resume: self._on_resume,
            FinAck: self._on_fin_ack,
            RenewAnswer: self._handover.on_renew_answer,
            Ping: lambda _ping, reply_to, _now: list(self._desk.pong(reply_to)),
        }
        self._on_engine: dict[type, Callable[[Any, Job, float], list[Command]]] = {
            door.Reserved: self._handover.on_reserved,
            door.Progress: self._steps.on_progress,
            door.TokenEvent: self._steps.on_tokens,
            door.Preempted: self._steps.on_preempted,
            door.Rejected: self._steps.on_preempted,  # to the router it is the same: the reservation is gone
            door.Failed: self._steps.on_engine_failed,
            door.Gone: self._steps.on_gone,
        }

    # --- the core's three methods, and what its shell shows ---

    def handle(self, event: object, now: float) -> list[Command]:
        """Total: an event that is not ours, or late, gives nothing."""
        commands = self._on_time(now)  # first: a waking worker must not act on what is over
        handler = self._on_event.get(type(event))
        return commands + handler(event, now) if handler is not None else commands

    def wake_at(self) -> float | None:
        times = [job.deadline for job in self._table]
        times += [at for at in (self._desk.tombstones.next_expiry(), self._desk.routers.next_at()) if at is not None]
        at = min(min(times, default=inf), self._handover.renew_at)
        return None if at == inf else at

    def beat(self, now: float, step_age_ms: int = 0, bus_lag_ms: int = 0) -> Beat:
        free = self._pool.free + self._pool.cached
        load = Load(free, self.promised_blocks, self.queued_tokens, self.running, self.waiting)
        return self._desk.beat(load, step_age_ms, bus_lag_ms)

    @property
    def idle(self) -> bool:
        """Nothing is held for anybody: a draining worker may leave."""
        return not len(self._table) and not self._table.copying

    @property
    def draining(self) -> bool:
        return self._desk.draining

    @property
    def refused(self) -> Counter[RefuseReason]:
        """Jobs and messages that were not taken, by reason."""
        return self._desk.refused

    @property
    def running(self) -> int:
        """Sequences that decode."""
        return self._sequences(DecodeState.RUNNING)

    @property
    def waiting(self) -> int:
        """Sequences that could be computed and have no token of their own yet."""
        return self._sequences(DecodeState.READY)

    def _sequences(self, state: DecodeState) -> int:
        return sum(sequence.live for job in self._table if job.state is state for sequence in job.sequences)

    @property
    def sources(self) -> frozenset[tuple[str, int]]:
        """(worker, incarnation) of all whose KV is awaited or being read."""
        return frozenset(
            (job.asked.source.worker, job.asked.source.incarnation) for job in self._table if job.asked.source
        )

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed here."""
        return sum(job.tokens_left for job in self._table)

    @property
    def promised_blocks(self) -> int:
        return self._table.promised_blocks

    @property
    def awaiting(self) -> int:
        """Jobs whose KV has not come."""
        return sum(job.state in (DecodeState.RESERVED, DecodeState.FETCHING) for job in self._table)

    # --- time ---

    def _on_time(self, now: float) -> list[Command]:
        desk = self._desk
        desk.tombstones.expire(now)
        commands: list[Command] = []
        for job in self._table:
            if job.deadline <= now:
                commands += self._endings.end(job, now)
        for router in desk.routers.silent(now):
            for job in self._table.of(router):
                commands += self._endings.end(job, now)
        commands += self._handover.renew(now)
        for router in desk.routers.digests_due(now):
            rows = (job.row() for job in self._table.of(router))
            commands.append(desk.digest(router, self._frames.last(router), rows))
        return commands

    # --- jobs in, jobs out ---

    def _on_received(self, event: Received, now: float) -> list[Command]:
        self._desk.observe(event.message, now)
        handler = self._on_message.get(type(event.message))
        return handler(event.message, event.reply_to, now) if handler is not None else []

    def _on_drain(self, _event: Drain, _now: float) -> list[Command]:
        self._desk.draining = True
        return []

    def _on_job(self, asked: DecodeJob, reply_to: str | None, now: float) -> list[Command]:
        job = self._table.get(asked.rid)
        answer = self._desk.stale(asked.incarnation) or self._answered_before(job, asked.rid, asked.da)
        commands: list[Command] = []
        if answer is None:
            answer, commands = self._replace(job, asked, now, new=True)
        return _answered(reply_to, answer, commands)

    def _on_amend(self, amend: Amend, reply_to: str | None, now: float) -> list[Command]:
        """The same request under a new number: what was here of it is dropped, and reserved anew in place."""
        job = self._table.get(amend.rid)
        answer = self._desk.stale(amend.incarnation) or self._answered_before(job, amend.rid, amend.da)
        commands: list[Command] = []
        if answer is None and job is None:
            answer = self._desk.refuse(RefuseReason.UNKNOWN, f"{amend.rid} is not here, so it cannot be amended")
            self._desk.tombstones.put(amend.rid, amend.da, now, answer)
        elif answer is None and job is not None:
            asked = replace(
                job.asked,
                da=amend.da,
                pa=amend.pa,
                source=amend.source,
                outputs=amend.outputs,
                ttl_s=amend.ttl_s,
            )
            answer, commands = self._replace(job, asked, now, new=False)
        return [] if answer is None else _answered(reply_to, answer, commands)

    def _answered_before(self, job: Job | None, rid: str, da: int) -> Accepted | Refused | None:
        if job is not None and da == job.asked.da and self._rules.same_number_same_answer:
            return job.answer
        if job is not None and da < job.asked.da:
            return self._desk.lower(da, job.asked.da)
        return self._desk.ended(rid, da)

    def _replace(
        self, job: Job | None, asked: DecodeJob, now: float, *, new: bool
    ) -> tuple[Accepted | Refused, list[Command]]:
        commands = self._endings.end(job, now) if job is not None else []
        sequences = fresh_sequences(asked)
        need = promised_blocks(asked, sequences, self._desk.identity.block_tokens, self._limits.promise_tokens)
        refused = self._refusal(asked, need, new)
        if refused is not None:
            self._desk.tombstones.put(asked.rid, asked.da, now, refused)
            return refused, commands
        answer = Accepted(reserved_blocks=need, queue_tokens=self.queued_tokens)
        source = asked.source
        state = DecodeState.READY if source is None else DecodeState.RESERVED
        job = Job(asked, answer, now + asked.ttl_s, sequences, state)
        self._table.add(job)
        add = door.Add(
            key=job.key,
            mode=door.Mode.LOCAL if source is None else door.Mode.AWAIT,
            ids=asked.ids if source is None else prompt_ids(job),
            prompt_len=len(asked.ids),
            outputs=asked.outputs,
            params=asked.params,
            seeds=asked.seeds,
            priority=asked.priority,
            cache_salt=asked.cache_salt,
            counted=not is_probe(asked.rid),
        )
        return answer, [*commands, ToEngine(add), *([] if source is None else [Attach(source)])]

    def _refusal(self, asked: DecodeJob, need: int, new: bool) -> Refused | None:
        desk = self._desk
        tokens = len(asked.ids) + max((len(ids) for ids in asked.outputs), default=0)
        unfit = desk.unfit(asked.fingerprint, tokens, new=new)
        if unfit is not None or not self._rules.promise:
            return unfit
        total = desk.identity.total_blocks
        if need > total:
            return desk.refuse(RefuseReason.TOO_LONG, f"{need} blocks are more than the {total} of this pool")
        capacity, promised = int(total * self._limits.pool_share), self.promised_blocks
        if promised and promised + need > capacity:  # alone, it may have all: when moved it needs more than at first
            return desk.refuse(RefuseReason.FULL, f"{need} blocks beside {promised} promised of {capacity}")
        return None

    def _on_cancel(self, cancel: Cancel, _reply_to: str | None, now: float) -> list[Command]:
        if self._desk.stale(cancel.incarnation) is not None:
            return []
        job = self._table.get(cancel.rid)
        commands = self._endings.end(job, now) if job is not None and job.asked.da <= cancel.da else []
        self._desk.tombstones.put(cancel.rid, cancel.da, now)
        return commands

    def _on_fin_ack(self, ack: FinAck, _reply_to: str | None, now: float) -> list[Command]:
        """The router needs no more of these sequences, whether or not they had ended by themselves."""
        if self._desk.stale(ack.incarnation) is not None:
            return []
        commands: list[Command] = []
        for slot in ack.slots:
            found = self._table.slot(ack.router, slot)
            if found is None:
                continue
            job, number = found
            sequence = job.sequences[number]
            if sequence.live and job.in_engine and job.state in (DecodeState.READY, DecodeState.RUNNING):
                commands.append(ToEngine(door.Abort(job.key, number)))
            sequence.acked = True
            commands += self._endings.settle(job, now)
        return commands

    def _on_resume(self, resume: Resume, reply_to: str | None, _now: float) -> list[Command]:
        stale = self._desk.stale(resume.incarnation)
        if stale is not None:
            return _answered(reply_to, stale, [])
        unknown: list[Key] = []
        for wanted in resume.rows:
            job = self._table.at((wanted.rid, wanted.attempt))
            number = wanted.slot - job.asked.slot if job is not None else -1
            if job is None or not 0 <= number < len(job.sequences):
                unknown.append((wanted.rid, wanted.attempt))
                continue
            row = job.rows_from(number, wanted.next_index)
            if row is not None:
                self._frames.add(resume.router, row)
        return _answered(reply_to, ResumeAnswer(tuple(unknown)), self._frames.flush())

    # --- the engine ---

    def _on_batch(self, event: EngineBatch, now: float) -> list[Command]:
        self._pool = event.batch.pool
        commands: list[Command] = []
        for happened in event.batch.events:
            handler = self._on_engine.get(type(happened))
            job = self._table.at(happened.key)
            if handler is not None and job is not None:
                commands += handler(happened, job, now)
        return [*self._frames.flush(), *commands]


def _answered(reply_to: str | None, answer: Message, commands: Iterable[Command]) -> list[Command]:
    return [*commands] if reply_to is None else [Answer(reply_to, answer), *commands]
