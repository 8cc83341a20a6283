"""Looks inside engines and cores, where an invariant is about what is inside. The only module here that does."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from simulation.invariants import Violation, require
from splitserve.decode.jobs import DecodeJobs
from splitserve.engine.engine import Engine
from splitserve.kv.pool import BlockPool
from splitserve.prefill.jobs import PrefillJobs
from splitserve.router.core import RouterCore

if TYPE_CHECKING:
    from simulation.worker import DecodeWorker, Worker


def holders(engine: Engine, blocks: int) -> list[int]:
    """How many block tables each block stands in."""
    found = [0] * blocks
    for job in engine._jobs.values():
        spans = {id(span): span for span in (job.prompt, *(sequence.span for sequence in job.sequences))}
        for span in spans.values():
            for table in span.tables:
                for block in table:
                    found[block] += 1
    return found


def blocks_add_up(worker: Worker) -> None:
    """Invariant 1: states sum to the total, no block is in two lists, refs are the number of holders."""
    pool = worker.memory.pool
    total, held = pool.total, holders(worker.engine, pool.total)
    free, cached = set(pool._free), set(pool._cached)
    owned = {block for block, refs in enumerate(pool._refs) if refs}
    once = len(free) == len(pool._free) and len(free) + len(cached) + len(owned) == total
    if pool._refs != held or not once or len(free | cached | owned) != total or not pool._filling <= owned:
        text = (
            f"{worker.name}: free {free}, cached {cached}, filling {pool._filling}, refs {pool._refs}, holders {held}"
        )
        raise Violation("blocks_add_up", text)


def what_is_loaded_is_what_the_final_handle_named(worker: DecodeWorker, key: Hashable) -> None:
    """Invariant 3, of all blocks of a job: those copied early too, whatever became of their owner since."""
    job = worker.jobs._table.at(key)
    if job is None or job.ready is None or job.reserved is None:
        return
    handle, skip = job.ready.handle, job.reserved.cached_blocks
    source = worker.mapped.get((handle.owner, handle.incarnation))
    if source is None or not worker.rules.validate_before_index:
        return
    for group, targets in zip(handle.groups, job.reserved.groups, strict=True):
        for named, target in list(zip(zip(group.blocks, group.generations, strict=True), targets, strict=True))[skip:]:
            sealed, have = source.sealed.get(named), worker.memory.read(target)
            text = f"{key}: {named} held {sealed}, block {target} has {have}"
            require(sealed == have, "what_is_loaded_is_what_the_final_handle_named", text)


def left_in_engine(engine: Engine, pool: BlockPool) -> str | None:
    """What an idle engine must not have."""
    stats = pool.stats
    if engine._jobs or stats.owned or stats.filling:
        return f"engine jobs {list(engine._jobs)}, {stats.owned} owned and {stats.filling} filling blocks"
    return None


def tombstones_left(core: PrefillJobs | DecodeJobs) -> str | None:
    """They are kept for 60 s."""
    count = len(core._desk.tombstones)
    return f"{count} tombstones" if count else None


def left_in_router(core: RouterCore) -> str | None:
    """What a router without requests must not have."""
    promised = {worker.beat.name: list(worker.promises) for worker in core.fleet if worker.promises}
    if promised or any(core.held.values()):
        return f"{core.held}, promises {promised}"
    return None
