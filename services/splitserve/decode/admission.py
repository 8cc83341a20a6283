"""From a message to a job, or to a refusal: repeats, fences, what fits; and the Cancel that ends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from splitserve.decode.effects import Attach, Command
from splitserve.decode.endings import Endings
from splitserve.decode.job import Job, fresh_sequences, promised_blocks
from splitserve.decode.matching import prompt_ids
from splitserve.decode.table import JobTable
from splitserve.engine import door
from splitserve.protocol.effects import Answer
from splitserve.protocol.messages import Accepted, Amend, Cancel, DecodeJob, Message, Refused
from splitserve.protocol.states import DecodeState, RefuseReason, is_probe
from splitserve.worker.desk import Desk
from splitserve.worker.effects import ToEngine


class Admission:
    """The part of the decode core that takes jobs."""

    def __init__(self, desk: Desk, table: JobTable, endings: Endings) -> None:
        self._desk = desk
        self._table = table
        self._endings = endings

    def on_job(self, asked: DecodeJob, reply_to: str | None, now: float) -> list[Command]:
        job = self._table.get(asked.rid)
        answer = self._desk.stale(asked.incarnation) or self._answered_before(job, asked.rid, asked.da)
        commands: list[Command] = []
        if answer is None:
            answer, commands = self._replace(job, asked, now, new=True)
        return answered(reply_to, answer, commands)

    def on_amend(self, amend: Amend, reply_to: str | None, now: float) -> list[Command]:
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
        return [] if answer is None else answered(reply_to, answer, commands)

    def _answered_before(self, job: Job | None, rid: str, da: int) -> Accepted | Refused | None:
        if job is not None and da == job.asked.da and self._desk.rules.same_number_same_answer:
            return job.answer
        if job is not None and da < job.asked.da:
            return self._desk.lower(da, job.asked.da)
        return self._desk.ended(rid, da)

    def _replace(
        self, job: Job | None, asked: DecodeJob, now: float, *, new: bool
    ) -> tuple[Accepted | Refused, list[Command]]:
        commands = self._endings.end(job, now) if job is not None else []
        sequences = fresh_sequences(asked)
        need = promised_blocks(asked, sequences, self._desk.identity.block_tokens, self._desk.limits.promise_tokens)
        refused = self._refusal(asked, need, new)
        if refused is not None:
            self._desk.tombstones.put(asked.rid, asked.da, now, refused)
            return refused, commands
        answer = Accepted(reserved_blocks=need, queue_tokens=self._table.queued_tokens)
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
        if unfit is not None or not self._desk.rules.promise:
            return unfit
        total = desk.identity.total_blocks
        if need > total:
            return desk.refuse(RefuseReason.TOO_LONG, f"{need} blocks are more than the {total} of this pool")
        capacity, promised = int(total * self._desk.limits.pool_share), self._table.promised_blocks
        if promised and promised + need > capacity:  # alone, it may have all: when moved it needs more than at first
            return desk.refuse(RefuseReason.FULL, f"{need} blocks beside {promised} promised of {capacity}")
        return None

    def on_cancel(self, cancel: Cancel, _reply_to: str | None, now: float) -> list[Command]:
        if self._desk.stale(cancel.incarnation) is not None:
            return []
        job = self._table.get(cancel.rid)
        commands = self._endings.end(job, now) if job is not None and job.asked.da <= cancel.da else []
        self._desk.tombstones.put(cancel.rid, cancel.da, now)
        return commands


def answered(reply_to: str | None, answer: Message, commands: Iterable[Command]) -> list[Command]:
    """The answer first, if somebody waits for it."""
    return [*commands] if reply_to is None else [Answer(reply_to, answer), *commands]
