"""A decode worker's jobs: reserved -> fetching -> ready -> running -> done. Decides only; `service` acts.

Three things end apart and are kept apart: a job ends when nobody wants it, its copy when the reader says so, its blocks
when both have. Blocks that a fetch still writes are therefore aborted in the engine only behind `Fetched` or `FetchFailed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf
from typing import Any

from splitserve.decode.admission import Admission, answered
from splitserve.decode.effects import Command, Fetched, FetchFailed, Key
from splitserve.decode.endings import Endings
from splitserve.decode.handover import Handover
from splitserve.decode.job import Job
from splitserve.decode.steps import Steps
from splitserve.decode.table import JobTable
from splitserve.engine import door
from splitserve.protocol.effects import BusDown, Drain, Received, Unanswered
from splitserve.protocol.messages import (
    Amend,
    Beat,
    Cancel,
    DecodeJob,
    FinAck,
    KvReady,
    Ping,
    RenewAnswer,
    Resume,
    ResumeAnswer,
)
from splitserve.protocol.states import DecodeState, RefuseReason, Role
from splitserve.protocol.subjects import Subjects
from splitserve.worker.desk import Desk, Load
from splitserve.worker.effects import EngineBatch, Identity, ToEngine
from splitserve.worker.frames import Frames
from splitserve.worker.rules import Limits, Rules


class DecodeJobs:
    """The core. `_admission` takes jobs, `_handover` KV from others, `_steps` hears the engine, `_endings` ends jobs."""

    def __init__(
        self,
        identity: Identity,
        subjects: Subjects,
        limits: Limits = Limits(),  # noqa: B008  # frozen
        rules: Rules = Rules(),  # noqa: B008
    ) -> None:
        self._desk = Desk(Role.DECODE, identity, subjects, limits, rules)
        self._table = JobTable(identity.block_tokens, limits.promise_tokens)
        self._frames = Frames(identity.name, identity.incarnation, subjects, limits.frame_tokens)
        self._pool = door.PoolStats(identity.total_blocks, identity.total_blocks, 0, 0, 0)
        self._endings = Endings(self._desk, self._table)
        self._admission = Admission(self._desk, self._table, self._endings)
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
            DecodeJob: self._admission.on_job,
            Amend: self._admission.on_amend,
            Cancel: self._admission.on_cancel,
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
        return self._table.queued_tokens

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
            return answered(reply_to, stale, [])
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
        return answered(reply_to, ResumeAnswer(tuple(unknown)), self._frames.flush())

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
