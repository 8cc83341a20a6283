"""How a run must end (invariants 5, 6 and 9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simulation.client import Client
from simulation.inspection import left_in_engine, left_in_router, tombstones_left
from simulation.invariants import require
from simulation.plan import Fate, Schedule
from simulation.router import RouterProcess
from simulation.worker import DecodeWorker, PrefillWorker
from splitserve.errors import (
    BusUnavailable,
    ContextTooLong,
    DeadlineExceeded,
    EngineFailed,
    LossBudgetSpent,
    NoWorkers,
    SplitserveError,
)
from splitserve.router.records import Record
from splitserve.router.refusals import WaitedTooLong

if TYPE_CHECKING:
    from simulation.world import World

LATE_S = 1.0  # a deadline may be seen so late
MOST_DEATHS = {"decode": 10, "prefil": 3}  # 8 losses and one more; a death before acceptance is no loss
DELAYS = 3  # of one answer's messages, behind each other
STEPS = 60  # that one answer may need, prompt and queue included
POISON_S = 10.0  # in which a poison kills one worker after the other, under others too
RECOVERY_S = 4.0  # to notice an event and go on elsewhere


def every_request_ended_in_time(client: Client, now: float, frozen_s: float) -> None:
    """By its deadline, but for the time in which its router slept."""
    rule = "every_request_ends_in_time"
    if client.gone:
        return
    require(client.done is not None, rule, f"{client.rid} is open at {now:.2f}, it came at {client.plan.at:.2f}")
    latest = client.began_at + client.plan.timeout_s + frozen_s + LATE_S
    text = f"{client.rid} ended at {client.done_at:.2f}, the latest was {latest:.2f}"
    require(client.done_at <= latest, rule, text)


def every_error_has_a_cause(client: Client, schedule: Schedule) -> None:
    """No answer is lost to what the design survives: an error needs a fault that explains it."""
    if client.gone or client.done is None or client.done.error is None:
        return
    error = client.done.error
    cause = CAUSES.get(type(error), _never)
    text = f"{client.rid} failed with {type(error).__name__} ({error}), and nothing in its schedule explains that"
    require(cause(schedule, client), "every_error_has_a_cause", text)


def a_poison_is_found_out(client: Client, deaths: int, other_poisons: int) -> None:
    """A request that kills who takes it kills only so many.

    One more for each other poison: a decode worker that dies as another poison kills the prefill worker of the same
    attempt is not charged, for that attempt is given up as a whole.
    """
    most = MOST_DEATHS.get(client.plan.poison[:6], 0) + other_poisons
    require(deaths <= most, "a_poison_is_found_out", f"{client.rid} killed {deaths} workers, {most} may be")


def nobody_queues_for_ever(client: Client, record: Record | None, queue_timeout_s: float) -> None:
    """Without any worker that took it, a request ends with its time in the queue."""
    if client.gone or client.done is None or record is None or record.decode:
        return
    waited = client.done_at - client.began_at
    text = f"{client.rid} waited {waited:.1f} s for a first worker, {queue_timeout_s:.1f} s may be"
    require(waited <= queue_timeout_s + LATE_S, "nobody_queues_for_ever", text)


def _has(schedule: Schedule, *fates: Fate, target: str = "") -> bool:
    return any(e.fate in fates and e.target.startswith(target) for e in schedule.events)


def _never(_schedule: Schedule, _client: Client) -> bool:
    return False


def _too_large(schedule: Schedule, client: Client) -> bool:
    """All its answers together may outgrow the pool of a decode worker, of which each has a block in part."""
    cluster, plan = schedule.cluster, client.plan
    tokens = len(plan.ids) + plan.params.max_tokens + cluster.block_tokens
    return len(plan.seeds) * tokens > cluster.decode_blocks * cluster.block_tokens


def _raised(schedule: Schedule, _client: Client) -> bool:
    return _has(schedule, Fate.RAISE)


def _bus(schedule: Schedule, _client: Client) -> bool:
    return _has(schedule, Fate.BUS_RESTART) or _has(schedule, Fate.CUT, Fate.PARTITION, Fate.FREEZE, target="router")


def _decode_away(schedule: Schedule, client: Client) -> bool:
    unknown = _has(schedule, Fate.KILL, target="router")  # a new router has not heard of anybody
    unheard = _bus(schedule, client) and _long_in_queue(schedule, client)
    return unknown or unheard or _has(schedule, *Fate, target="decode") or _poisoned(schedule, "decode")


def _poisoned(schedule: Schedule, victims: str) -> bool:
    return any(client.poison.startswith(victims) for client in schedule.clients if client.poison)


def _killed_too_many(schedule: Schedule, _client: Client) -> bool:
    return _poisoned(schedule, "decode")  # who shares workers with a poison is lost with it


def _trouble_s(schedule: Schedule) -> float:
    """What events, messages that came late or never, and slow steps may have cost one answer, in seconds."""
    network = schedule.network
    late_s = DELAYS * network.late[1] if network.delay + network.drop else sum(s.late for s in schedule.singles)
    events_s = sum(event.seconds + RECOVERY_S for event in schedule.events)
    poison_s = POISON_S if _poisoned(schedule, "") else 0.0
    return late_s + events_s + poison_s + STEPS * schedule.cluster.step_s[1]


def _out_of_time(schedule: Schedule, client: Client) -> bool:
    return _trouble_s(schedule) >= client.plan.timeout_s


def _long_in_queue(schedule: Schedule, _client: Client) -> bool:
    return _trouble_s(schedule) >= schedule.cluster.queue_timeout_s


CAUSES: dict[type[SplitserveError], Callable[[Schedule, Client], bool]] = {
    EngineFailed: _raised,
    ContextTooLong: _too_large,
    BusUnavailable: _bus,
    NoWorkers: _decode_away,
    DeadlineExceeded: _out_of_time,
    LossBudgetSpent: _killed_too_many,
    WaitedTooLong: _long_in_queue,
}


def everything_is_given_back(world: World, tombstones: bool) -> str | None:
    """The first thing that is still held, in words; None when there is nothing."""
    for process in world.processes.values():
        if not process.alive:
            continue
        if isinstance(process, RouterProcess):
            left = left_in_router(process.router)
        elif isinstance(process, PrefillWorker | DecodeWorker):
            left = _left_in_worker(process) or (tombstones_left(process.jobs) if tombstones else None)
        else:
            left = None
        if left is not None:
            return f"{process.name}: {left}"
    return _left_in_store(world)


def _left_in_worker(worker: PrefillWorker | DecodeWorker) -> str | None:
    jobs = worker.jobs
    leases = len(worker.jobs.leases) if isinstance(worker, PrefillWorker) else 0
    fetches = len(worker.transfers) if isinstance(worker, DecodeWorker) else 0
    if leases or fetches or jobs.promised_blocks or not jobs.idle:
        return f"{leases} leases, {fetches} fetches, {jobs.promised_blocks} promised blocks, idle is {jobs.idle}"
    return left_in_engine(worker.engine, worker.memory.pool)


def _left_in_store(world: World) -> str | None:
    """Invariant 5's other half: the store has each answered request's one final state."""
    for client in world.clients:
        kept = world.redis.rows.get(client.rid)
        if client.done is None or kept is None or kept.row.owner != world.router.name:
            continue  # a dead router's last commit is lost with it: the key's age ends it
        if not kept.row.final:
            return f"the store has {client.rid} as {kept.row.fields.get('state')}"
    return None
