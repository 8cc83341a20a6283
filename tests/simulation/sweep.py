"""One fault at each message of fault-free schedules (invariant 7): whatever is lost, doubled or late, the answers are whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from simulation.faults import MessageFault, SingleFault
from simulation.invariants import Violation
from simulation.plan import Schedule
from simulation.schedules import schedule_of
from simulation.world import Result, run

BASES = 12
FIRST_BASE = 1_000_000_000  # seeds of the bases begin here


def base_schedule(number: int) -> Schedule:
    """A fault-free run of a few clients that all stay to the end."""
    drawn = schedule_of(FIRST_BASE + number, "calm")
    split = ("always", "always", "auto", "never")[number % 4]
    clients = tuple(replace(client, leaves_at=None, stop=None, timeout_s=20.0) for client in drawn.clients[:3])
    return replace(drawn, cluster=replace(drawn.cluster, split=split), clients=clients, long=False)


def single_faults(number: int) -> Iterator[Schedule]:
    """Every schedule that differs from base `number` in the fate of one message."""
    base = base_schedule(number)
    for at in range(1, run(base).messages + 1):
        for fault in MessageFault:
            yield replace(base, singles=(SingleFault(at, fault),))


def run_single(schedule: Schedule) -> Result:
    """Play it; an answer that is not whole is a violation."""
    result = run(schedule)
    if result.violation is not None:
        return result
    for client in result.clients:
        if client.outcome != "finished":
            text = f"{client.rid} is {client.outcome} after {schedule.singles}"
            return replace(result, violation=Violation("one_fault_costs_no_answer", text))
    return result
