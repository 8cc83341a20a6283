"""One engine, two roles: commands in, one batch of events a step out (`door.py`). No torch, no thread, no clock of its own.

Each job that was added leaves exactly once: `Gone`, `Preempted`, `Failed` or `Rejected`. What comes for a job that has
left is dropped; its end has been told already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count

from splitserve.engine import door, events
from splitserve.engine.batch import Runner, StepBatch
from splitserve.engine.execution import Execution, execute
from splitserve.engine.scheduler import Plan, PlannedRow, Scheduler
from splitserve.engine.sequence import (
    EngineConfig,
    Job,
    Phase,
    Sequence,
    blocks_for,
    cannot_serve,
    finish_reason,
    make_job,
)
from splitserve.engine.tables import BlockTables
from splitserve.errors import EngineFailed
from splitserve.kv.pool import BlockPool
from splitserve.kv.prefix import PrefixIndex, chain_seed
from splitserve.protocol.params import TokenLogprob
from splitserve.protocol.states import FinishReason

logger = logging.getLogger("splitserve.engine")


class Engine:
    """`submit` commands, then call `answer` (a round of commands) and `step` (commands, then the model) while `has_work`.

    A host sends what `answer` returns before it starts a step, so that a `Reserved` need not wait for the model. The
    simulator uses `begin` and `finish`, between which virtual time passes; `step` is those two round the runner.
    `clock` gives seconds, monotonic.
    """

    def __init__(
        self, config: EngineConfig, pool: BlockPool, prefix: PrefixIndex, runner: Runner, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._pool = pool
        self._runner = runner
        self._clock = clock
        self._tables = BlockTables(pool, prefix if config.prefix_caching else None, config.block_tokens)
        self._scheduler = Scheduler(config, self._tables)
        self._jobs: dict[door.Key, Job] = {}
        self._inbox: list[door.Command] = []
        self._events: list[door.Event] = []
        self._plan: Plan | None = None
        self._began_at = 0.0
        self._blocked = False  # nothing can go on before the next command
        self._arrivals = count()

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._inbox or self._events or (self._scheduler.busy and not self._blocked))

    @property
    def load(self) -> tuple[int, int]:
        """How many are being computed and how many wait, also while a step is under way. From any thread."""
        return self._scheduler.counts

    def submit(self, command: door.Command) -> None:
        """Note a command; it is carried out between steps, never under one."""
        self._inbox.append(command)

    def answer(self) -> door.Batch | None:
        """Carry out the commands; None when they gave no event."""
        self._carry_out()
        return self._batch(None) if self._events else None

    def step(self, early: Callable[[door.Batch], None] | None = None) -> door.Batch | None:
        """Commands, then one step of the model; None when there was nothing to do.

        `early` gets what is known before the model runs; without it that comes with the step.
        """
        batch = self.begin()
        if batch is None:
            return self._batch(None) if self._events else None
        if early is not None and (known := self.known()) is not None:
            early(known)
        return self.finish(execute(self._runner, batch))

    def begin(self) -> StepBatch | None:
        """Carry out the commands and plan a step; `finish` must follow.

        None when nothing can go on; events, if any, then wait for `answer`.
        """
        self._carry_out()
        self._began_at = self._clock()
        plan = self._scheduler.schedule(self._began_at)
        for job in plan.gave_way:
            self._leave(job, door.Preempted(job.key))
        for job in plan.started:
            if job.mode is door.Mode.PREFILL and job.cached_tokens:
                self._events.append(events.progress(job, self._pool, self._config.block_tokens))
        self._blocked = not plan.rows
        if self._blocked:
            return None
        self._plan = plan
        return plan.batch

    def known(self) -> door.Batch | None:
        """Between `begin` and `finish`: the events that need not wait for the step; None when there are none."""
        return self._batch(None) if self._events else None

    def finish(self, execution: Execution) -> door.Batch:
        """Take the tokens in: the step's events and counts. EngineFailed without `begin`."""
        plan, self._plan = self._plan, None
        if plan is None:
            raise EngineFailed("finish without begin: no step is under way")
        now = self._clock()
        self._commit(plan, execution, now)
        awaiting = sum(job.phase is Phase.AWAITING for job in self._jobs.values())
        return self._batch(events.stats(plan, self._scheduler, awaiting, now - self._began_at))

    # --- commands ---

    def _carry_out(self) -> None:
        if self._plan is not None:
            raise EngineFailed("a step is under way; call finish first")
        commands, self._inbox = self._inbox, []
        if commands:
            self._blocked = False
        for command in commands:
            match command:
                case door.Add():
                    self._add(command)
                case door.Loaded():
                    self._loaded(command)
                case door.Abort():
                    self._abort(command)
                case door.Release():
                    self._release(command)

    def _add(self, add: door.Add) -> None:
        if add.key in self._jobs:
            logger.warning("job_repeated", extra={"key": str(add.key)})
            return
        rank = (add.priority, next(self._arrivals))
        hash_seed = chain_seed(self._config.fingerprint, cache_salt=add.cache_salt)
        job = make_job(add, rank, hash_seed, self._config.eos_ids, self._clock())
        if refusal := cannot_serve(job, self._pool.total, self._config):
            self._events.append(door.Rejected(job.key, refusal))
            return
        if add.mode is door.Mode.AWAIT:
            self._reserve(job)
            return
        self._jobs[job.key] = job
        cached = len(self._tables.lookup(job.prompt, job.hash_seed)) * self._config.block_tokens
        job.uncached = len(job.prompt.ids) - cached
        self._scheduler.add(job)
        if add.mode is door.Mode.LOCAL:
            for sequence in job.sequences:
                self._end_if_complete(sequence)
            if not job.live:
                self._drop(job, door.Gone(job.key))

    def _reserve(self, job: Job) -> None:
        """Blocks at once or not at all: a fetch never waits for allocation (invariant 10)."""
        if not self._tables.start(job.prompt, job.hash_seed):
            need, available = blocks_for(len(job.prompt.ids), self._config.block_tokens), self._pool.available
            message = f"{need} KV blocks are needed and {available} of {self._pool.total} are available"
            self._events.append(door.Rejected(job.key, message))
            return
        self._jobs[job.key] = job
        job.phase = Phase.AWAITING
        job.cached_tokens = job.prompt.computed
        self._events.append(events.reserved(job, self._config.block_tokens))

    def _loaded(self, loaded: door.Loaded) -> None:
        job = self._jobs.get(loaded.key)
        if job is None or job.phase is not Phase.AWAITING:
            return
        job.ready_at, awaited = self._clock(), len(job.prompt.ids)
        self._tables.written(job.prompt, awaited, job.hash_seed)
        for sequence in job.live:
            if sequence.num_outputs == loaded.index and loaded.first_ids:
                sequence.span.ids.append(loaded.first_ids[sequence.number])
            self._end_if_complete(sequence)
        if any(len(sequence.span.ids) <= awaited for sequence in job.live):
            message = f"loaded up to output token {loaded.index}, but a sequence has no token to go on from"
            self._drop(job, door.Failed(job.key, message))
            return
        self._continue(job, self._scheduler.load)

    def _end_if_complete(self, sequence: Sequence) -> None:
        """What came with the job may have ended it already; then an event without ids says so."""
        if not sequence.num_outputs:
            return
        sequence.finish = self._finish_reason(sequence)
        if not sequence.live:
            self._events.append(events.ended(sequence))

    def _abort(self, abort: door.Abort) -> None:
        job = self._jobs.get(abort.key)
        if job is None:
            return
        if abort.sequence is not None and job.mode is not door.Mode.PREFILL:
            sequence = job.sequences[abort.sequence]
            if not sequence.live:
                return
            if job.phase in (Phase.RUNNING, Phase.LOADED):
                self._end(sequence)
            sequence.aborted = True
            if job.live:
                return
        self._drop(job, door.Gone(job.key))

    def _release(self, release: door.Release) -> None:
        job = self._jobs.get(release.key)
        if job is not None and job.mode is door.Mode.PREFILL:
            self._drop(job, door.Gone(job.key))

    # --- the end of a step ---

    def _commit(self, plan: Plan, execution: Execution, now: float) -> None:
        output, failures, at = execution.output, execution.failures, 0
        for number, (planned, row) in enumerate(zip(plan.rows, plan.batch_rows)):
            job, until = planned.job, at + len(planned.sampled)
            ids, logprobs, at = output.ids[at:until], output.logprobs[at:until], until
            if job.phase is Phase.GONE:
                continue  # another row of it failed
            if number in failures:
                self._drop(job, door.Failed(job.key, failures[number]))
                continue
            self._tables.written(planned.span, row.start + len(row.ids), job.hash_seed)
            if job.phase is Phase.COMPUTING:
                self._prompt_advanced(planned, ids, logprobs, now)
            elif planned.sampled:
                sequence = planned.sampled[0]
                self._append(sequence, ids[0], logprobs[0], now)
                if not sequence.live:
                    self._end(sequence)
                    if not job.live:
                        self._drop(job, door.Gone(job.key))

    def _prompt_advanced(
        self, planned: PlannedRow, ids: tuple[int, ...], logprobs: tuple[TokenLogprob | None, ...], now: float
    ) -> None:
        job = planned.job
        job.uncached = job.prompt.left
        self._events.append(events.progress(job, self._pool, self._config.block_tokens))
        if job.uncached:
            return
        self._scheduler.remove(job)
        if job.mode is door.Mode.PREFILL:
            self._hold(job, ids, logprobs, now)
            return
        for sequence, token, logprob in zip(planned.sampled, ids, logprobs):
            self._append(sequence, token, logprob, now)
        self._continue(job, self._scheduler.run)

    def _hold(self, job: Job, ids: tuple[int, ...], logprobs: tuple[TokenLogprob | None, ...], now: float) -> None:
        job.phase = Phase.HELD
        total = len(job.prompt.ids)
        index = total - job.prompt_len
        finishes = tuple(self._finish_of(job, token, index + 1, total + 1) for token in ids)
        self._events.append(events.prefilled(job, self._pool, ids, finishes, logprobs, now))

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None, now: float) -> None:
        """One sampled token: the sequence's ids, its end, its event."""
        sequence.span.ids.append(token)
        sequence.finish = self._finish_reason(sequence)
        self._events.append(events.token(sequence, logprob, now))

    def _finish_reason(self, sequence: Sequence) -> FinishReason:
        ids = sequence.span.ids
        return self._finish_of(sequence.job, ids[-1], sequence.num_outputs, len(ids))

    def _finish_of(self, job: Job, token: int, num_outputs: int, total: int) -> FinishReason:
        return finish_reason(token, num_outputs, total, job.params, job.stop_ids, self._config.max_model_len)

    # --- the life of a job ---

    def _continue(self, job: Job, queue: Callable[[Job], None]) -> None:
        """The prompt's KV is complete: its live sequences go on from it."""
        live = job.live
        if not live:
            self._drop(job, door.Gone(job.key))
            return
        self._tables.fork(job.prompt, [sequence.span for sequence in live])
        queue(job)

    def _end(self, sequence: Sequence) -> None:
        """A sequence leaves the batch; its job may go on."""
        self._scheduler.remove_sequence(sequence)
        self._tables.release(sequence.span)

    def _drop(self, job: Job, event: door.Gone | door.Failed) -> None:
        """All of a job leaves, wherever it stands."""
        self._scheduler.remove(job)
        self._tables.release(job.prompt)
        for sequence in job.sequences:
            self._tables.release(sequence.span)
        self._leave(job, event)

    def _leave(self, job: Job, event: door.Gone | door.Failed | door.Preempted) -> None:
        del self._jobs[job.key]
        self._events.append(event)

    def _batch(self, stats: door.StepStats | None) -> door.Batch:
        told, self._events = tuple(self._events), []
        return door.Batch(told, stats, self._pool.stats, self._scheduler.queued_tokens)
