"""Which rows go into the next step.

All decodes first, then chunks up to the token budget: sequences that replay, prompts under way, new prompts in order of
(priority, arrival). The more sequences wait for a step, the less prompt it reads; and one that takes in a sequence whose
prompt was read elsewhere reads none, but no two in a row: what it decodes there has waited for the hand-over and for the step
before. A prompt gets blocks for all of its ids when its first chunk is scheduled, so two half-read prompts cannot wait for
each other. When a decode finds the pool dry, the newest job in the batch gives way, itself if need be: the oldest always gets
on. Held and awaited blocks are never taken: their leases and deadlines end them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from splitserve.engine.batch import StepBatch, StepRow
from splitserve.engine.sequence import EngineConfig, Job, Phase, Sequence, Span
from splitserve.engine.tables import BlockTables


@dataclass(slots=True)
class PlannedRow:
    """Whose row it is; `sampled` in the order of its samples."""

    job: Job
    span: Span
    sampled: tuple[Sequence, ...]


@dataclass(slots=True)
class Plan:
    """One step: the batch for the runner, and beside each of its rows whose it is."""

    rows: list[PlannedRow] = field(default_factory=list[PlannedRow])
    batch_rows: list[StepRow] = field(default_factory=list[StepRow])
    num_decodes: int = 0
    started: list[Job] = field(default_factory=list[Job])  # their prompts have blocks from this step on
    gave_way: list[Job] = field(default_factory=list[Job])  # preempted for good: their sequences had begun
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    @property
    def batch(self) -> StepBatch:
        return StepBatch(tuple(self.batch_rows), self.num_decodes)


def _rank(entry: Job | Sequence) -> tuple[int, int]:
    return entry.rank if isinstance(entry, Job) else entry.job.rank


class Scheduler:
    """Owns the queues; each is sorted by rank."""

    def __init__(self, config: EngineConfig, tables: BlockTables) -> None:
        self._config = config
        self._tables = tables
        self.waiting: list[Job] = []
        self.loaded: list[Job] = []
        self.computing: list[Job] = []
        self.running: list[Sequence] = []
        self._light = False  # the last step was to read no prompts

    @property
    def queued_tokens(self) -> int:
        """Uncached prompt ids that wait or are being computed."""
        return sum(job.uncached for job in self.waiting) + sum(job.uncached for job in self.computing)

    @property
    def counts(self) -> tuple[int, int]:
        """(rows in the batch: prompts and sequences; jobs that wait), of those that are counted. From any thread."""
        rows = (*tuple(self.computing), *(sequence.job for sequence in tuple(self.running)))
        waiting = (*tuple(self.waiting), *tuple(self.loaded))
        return sum(job.counted for job in rows), sum(job.counted for job in waiting)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.computing or self.waiting or self.loaded)

    def add(self, job: Job) -> None:
        """Its prompt is to be computed."""
        job.phase = Phase.WAITING
        insort(self.waiting, job, key=_rank)

    def load(self, job: Job) -> None:
        """Its prompt's KV is there: its sequences decode as soon as there are seats."""
        job.phase = Phase.LOADED
        insort(self.loaded, job, key=_rank)

    def run(self, job: Job) -> None:
        """Its live sequences are in the batch from the next step on."""
        job.phase = Phase.RUNNING
        for sequence in job.live:
            insort(self.running, sequence, key=_rank)

    def remove(self, job: Job) -> None:
        """Take it off its queue, if it is on one."""
        match job.phase:
            case Phase.WAITING:
                self.waiting.remove(job)
            case Phase.COMPUTING:
                self.computing.remove(job)
            case Phase.LOADED:
                self.loaded.remove(job)
            case Phase.RUNNING:
                self.running = [sequence for sequence in self.running if sequence.job is not job]
            case Phase.AWAITING | Phase.HELD | Phase.GONE:
                pass
        job.phase = Phase.GONE

    def remove_sequence(self, sequence: Sequence) -> None:
        if sequence.job.phase is Phase.RUNNING:
            self.running.remove(sequence)

    def schedule(self, now: float) -> Plan:
        """Rows of the next step; none when nothing can go on."""
        plan = Plan()
        seated = self._seat_loaded(now)
        self._make_room(plan)
        replays = self._add_decodes(plan)
        budget = self._prompt_tokens(plan.num_decodes, seated=seated)
        budget = self._add_replays(plan, replays, budget)
        budget = self._add_prompts(plan, self.computing, budget)
        while budget > 0 and (job := self._start_next(plan, now)):
            budget = self._add_prompts(plan, (job,), budget)
        return plan

    def _prompt_tokens(self, decodes: int, *, seated: bool) -> int:
        """How many the next step may read. `seated`: it takes in a sequence whose prompt was read elsewhere."""
        most = self._config.chunk_tokens
        self._light = seated and decodes > 0 and not self._light
        if self._light:
            return 0
        if not self.running:  # no inter-token latency to keep
            return max(most, self._config.lone_chunk_tokens)
        return max(-(-most // 4), most - self._config.tokens_a_decode * decodes)

    def _seats_for(self, job: Job) -> bool:
        taken = len(self.running) + sum(job.seats for job in self.computing)
        return taken + job.seats <= self._config.max_num_seqs

    def _seat_loaded(self, now: float) -> bool:
        """Whether there was one."""
        seated = False
        while self.loaded and self._seats_for(self.loaded[0]):
            job = self.loaded.pop(0)
            job.start(now)
            self.run(job)
            seated = True
        return seated

    def _make_room(self, plan: Plan) -> None:
        """A block for each position that will be written; oldest first, so that those who give way come after."""
        at, size = 0, self._config.block_tokens
        while at < len(self.running):
            span = self.running[at].span
            if len(span.tables[0]) * size >= len(span.ids) or self._tables.grow(span):
                at += 1
            else:
                self._preempt_newest(plan)

    def _preempt_newest(self, plan: Plan) -> None:
        """A prompt that is being computed starts again later; of a job that has begun to decode, the router moves it."""
        newest = [queue[-1] for queue in (self.computing, self.loaded) if queue]
        job = max((self.running[-1].job, *newest), key=_rank)
        plan.preemptions += job.counted
        restart = job.phase is Phase.COMPUTING
        self.remove(job)
        self._tables.release(job.prompt)
        if restart:
            job.uncached = job.prompt.left
            self.add(job)
            return
        for sequence in job.sequences:
            self._tables.release(sequence.span)
        plan.gave_way.append(job)

    def _add_decodes(self, plan: Plan) -> list[Sequence]:
        """Rows for all that need one token; returns those that need more first."""
        rows, batch_rows = plan.rows, plan.batch_rows
        replays: list[Sequence] = []
        for sequence in self.running:
            span = sequence.span
            ids, start = span.ids, span.computed
            if len(ids) - start > 1:
                replays.append(sequence)
                continue
            rows.append(PlannedRow(sequence.job, span, (sequence,)))
            batch_rows.append(StepRow(ids[-1:], start, span.tables, (sequence.sample_row(),)))
        plan.num_decodes = len(rows)
        return replays

    def _add_replays(self, plan: Plan, replays: Iterable[Sequence], budget: int) -> int:
        for sequence in replays:
            if not budget:
                break
            budget -= self._add_chunk(plan, sequence.job, sequence.span, [sequence], budget)
        return budget

    def _add_prompts(self, plan: Plan, jobs: Iterable[Job], budget: int) -> int:
        for job in jobs:
            if not budget:
                break
            # a sequence with outputs of its own goes on by replaying them; those without are sampled from the prompt
            total = len(job.prompt.ids)
            sampled = [s for s in job.sequences if s.live and len(s.span.ids) == total]
            budget -= self._add_chunk(plan, job, job.prompt, sampled, budget)
        return budget

    def _add_chunk(self, plan: Plan, job: Job, span: Span, sampled: list[Sequence], budget: int) -> int:
        """The next chunk of a span, sampled where it is the last; returns its tokens."""
        start, left = span.computed, span.left
        count = min(left, budget)
        rows = tuple(sampled) if count == left else ()
        plan.rows.append(PlannedRow(job, span, rows))
        samples = tuple(sequence.sample_row() for sequence in rows)
        plan.batch_rows.append(StepRow(span.ids[start : start + count], start, span.tables, samples))
        return count

    def _start_next(self, plan: Plan, now: float) -> Job | None:
        """Take the first waiting job in, if there are seats, blocks, and a block to spare for each that decodes."""
        if not self.waiting or not self._seats_for(self.waiting[0]):
            return None
        job = self.waiting[0]
        if not self._tables.start(job.prompt, job.hash_seed, spare=len(self.running)):
            return None
        del self.waiting[0]
        job.phase = Phase.COMPUTING
        job.cached_tokens = job.prompt.computed
        job.uncached = job.prompt.left
        job.told_blocks = 0
        plan.started.append(job)
        if job.start(now) and job.counted:
            plan.prefix_queries += len(job.prompt.ids)
            plan.prefix_hits += job.cached_tokens
        insort(self.computing, job, key=_rank)
        return job
