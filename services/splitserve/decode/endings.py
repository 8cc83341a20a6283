"""How a decode job ends: what to tell the engine and the reader, what to keep, what mark to leave."""

from __future__ import annotations

from splitserve.decode.effects import AbandonFetch, Command
from splitserve.decode.job import Job
from splitserve.decode.table import JobTable
from splitserve.engine import door
from splitserve.protocol.states import DecodeState
from splitserve.worker.desk import Desk
from splitserve.worker.effects import ToEngine


class Endings:
    """`stop` leaves the job in the table, `end` does not; `settle` ends what has nothing left to do."""

    def __init__(self, desk: Desk, table: JobTable) -> None:
        self._desk = desk
        self._table = table

    def settle(self, job: Job, now: float) -> list[Command]:
        """A job all of whose sequences are over keeps its output until the router has it."""
        if not job.over:
            return []
        if all(sequence.acked for sequence in job.sequences) or not self._desk.rules.keep_until_finack:
            return self.end(job, now)
        if job.state is DecodeState.DONE:
            return []
        early = job.state in (DecodeState.RESERVED, DecodeState.FETCHING)
        commands = self.stop(job) if early else []  # later its sequences left the engine one by one
        job.state = DecodeState.DONE
        job.deadline = min(job.deadline, now + self._desk.limits.done_kept_s)
        return commands

    def end(self, job: Job, now: float) -> list[Command]:
        """Drop a job in whatever state it is."""
        commands = self.stop(job)
        self._table.remove(job)
        self._desk.tombstones.put(job.asked.rid, job.asked.da, now)
        return commands

    def stop(self, job: Job) -> list[Command]:
        """Take a job from the engine, but no block from under its copy."""
        commands: list[Command] = []
        if job.intake.under_way:
            job.intake.abandon()
            commands.append(AbandonFetch(job.key))
            if self._desk.rules.free_after_copy:
                self._table.copying[job.key] = len(job.reserved.groups[0]) if job.reserved else 0
                job.in_engine = False
        if job.in_engine:
            commands.append(ToEngine(door.Abort(job.key)))
            job.in_engine = False
        return commands
