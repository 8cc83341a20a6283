"""What a step of the engine means for the jobs it touched: rows for their routers, ends, lost reservations."""

from __future__ import annotations

from splitserve.decode.effects import Command
from splitserve.decode.endings import Endings
from splitserve.decode.job import Job
from splitserve.engine import door
from splitserve.protocol.effects import Publish
from splitserve.protocol.messages import Preempted, TokenRow
from splitserve.protocol.states import DecodeState, FinishReason
from splitserve.worker.desk import Desk
from splitserve.worker.frames import Frames


class Steps:
    """The part of the decode core that hears the engine. Rows are added to `frames`; who owns them flushes."""

    def __init__(self, desk: Desk, frames: Frames, endings: Endings) -> None:
        self._desk = desk
        self._frames = frames
        self._endings = endings

    def on_progress(self, event: door.Progress, job: Job, _now: float) -> list[Command]:
        job.computed = event.tokens
        return []

    def on_tokens(self, event: door.TokenEvent, job: Job, now: float) -> list[Command]:
        row = job.token_row(event)
        if row is None:
            return []
        self._frames.add(job.asked.router, row)
        job.state = DecodeState.RUNNING
        return self._endings.settle(job, now)

    def on_preempted(self, _event: object, job: Job, now: float) -> list[Command]:
        job.in_engine = False
        gone = Preempted(job.asked.rid, self._desk.identity.name, job.asked.da, job.asked.trace)
        return [*self._endings.end(job, now), Publish(self._desk.subjects.router_events(job.asked.router), gone)]

    def on_engine_failed(self, _event: door.Failed, job: Job, now: float) -> list[Command]:
        job.in_engine = False
        for number, sequence in enumerate(job.sequences):
            if sequence.live:
                sequence.finish = FinishReason.ERROR
                at = len(sequence.outputs)
                self._frames.add(
                    job.asked.router, TokenRow(job.asked.slot + number, job.asked.da, at, (), FinishReason.ERROR)
                )
        return self._endings.settle(job, now)

    def on_gone(self, _event: door.Gone, job: Job, _now: float) -> list[Command]:
        job.in_engine = False
        return []
