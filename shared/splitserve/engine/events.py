"""What the engine tells of a job and of a step, made from their state."""

from __future__ import annotations

from collections.abc import Sequence as Items

from splitserve.engine import door
from splitserve.engine.scheduler import Plan, Scheduler
from splitserve.engine.sequence import Job, Sequence
from splitserve.kv.pool import BlockPool
from splitserve.protocol.handle import GroupBlocks
from splitserve.protocol.params import TokenLogprob
from splitserve.protocol.states import FinishReason


def reserved(job: Job, block_tokens: int) -> door.Reserved:
    """Of a job whose awaited span has just got its blocks: all that is computed was cached."""
    tables = tuple(tuple(table) for table in job.prompt.tables)
    return door.Reserved(job.key, tables, job.cached_tokens // block_tokens, job.cached_tokens)


def progress(job: Job, pool: BlockPool, block_tokens: int) -> door.Progress:
    """Of a job whose prompt has got on; each full block is told once to those who may read it."""
    prompt = job.prompt
    first, full = job.told_blocks, prompt.computed // block_tokens
    if job.mode is not door.Mode.PREFILL or not prompt.left or first == full:
        return door.Progress(job.key, prompt.computed)
    job.told_blocks = full
    blocks = [tuple(table[first:full]) for table in prompt.tables]
    groups = tuple(GroupBlocks(group, part, pool.generations(part)) for group, part in enumerate(blocks))
    return door.Progress(job.key, prompt.computed, groups, prompt.hashes[full - 1].hex())


def prefilled(
    job: Job,
    pool: BlockPool,
    first_ids: tuple[int, ...],
    finishes: tuple[FinishReason, ...],
    logprobs: Items[TokenLogprob | None],
    now: float,
) -> door.Prefilled:
    """Of a job whose prompt is computed; generations as they are while its blocks are held."""
    total, hashes = len(job.prompt.ids), job.prompt.hashes
    groups = enumerate(job.prompt.tables)
    return door.Prefilled(
        job.key,
        tuple(GroupBlocks(group, tuple(table), pool.generations(table)) for group, table in groups),
        kv_tokens=total,
        chain_hash=hashes[-1].hex() if hashes else "",
        index=total - job.prompt_len,
        first_ids=first_ids,
        finishes=finishes,
        logprobs=tuple(logprob for logprob in logprobs if logprob is not None),
        cached_tokens=job.cached_tokens,
        queue_s=job.started_at - job.ready_at,
        prefill_s=now - job.started_at,
    )


def token(sequence: Sequence, logprob: TokenLogprob | None, now: float) -> door.TokenEvent:
    """Of the last id of a sequence, which was sampled in this step."""
    job, ids = sequence.job, sequence.span.ids
    index, logprobs = sequence.num_outputs - 1, () if logprob is None else (logprob,)
    if sequence.reported:
        return door.TokenEvent(job.key, sequence.number, index, (ids[-1],), sequence.finish, logprobs)
    sequence.reported = True
    local, since_start = job.mode is door.Mode.LOCAL, now - job.started_at
    return door.TokenEvent(
        job.key,
        sequence.number,
        index,
        (ids[-1],),
        sequence.finish,
        logprobs,
        cached_tokens=job.cached_tokens if local else 0,
        queue_s=job.started_at - job.ready_at,
        prefill_s=since_start if local else 0.0,
        first_step_s=0.0 if local else since_start,
    )


def ended(sequence: Sequence) -> door.TokenEvent:
    """Of a sequence that ended with a token that came with the job: no ids, only the reason."""
    return door.TokenEvent(sequence.job.key, sequence.number, sequence.num_outputs, (), sequence.finish)


def stats(plan: Plan, scheduler: Scheduler, awaiting: int, seconds: float) -> door.StepStats:
    """Of a step, as the queues stand after it."""
    prefilled = decoded = replayed = samples = attended = context = 0
    for number, (planned, row) in enumerate(zip(plan.rows, plan.batch_rows)):
        if not planned.job.counted:
            continue
        tokens = len(row.ids)
        reached = row.start + tokens
        samples += len(row.samples)
        attended += tokens * reached
        if number < plan.num_decodes:
            decoded += 1
            context += reached
        elif planned.span is planned.job.prompt:
            prefilled += tokens
        else:  # its last token is a decode like any other
            replayed += tokens - len(row.samples)
            decoded += len(row.samples)
    return door.StepStats(
        seconds=seconds,
        prefill_tokens=prefilled,
        decode_tokens=decoded,
        replayed_tokens=replayed,
        samples=samples,
        attended=attended,
        context=context,
        running=len(scheduler.running) + len(scheduler.computing),
        waiting=len(scheduler.waiting) + len(scheduler.loaded),
        awaiting=awaiting,
        prefix_queries=plan.prefix_queries,
        prefix_hits=plan.prefix_hits,
        preemptions=plan.preemptions,
    )
