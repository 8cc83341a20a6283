"""Is a safety rule needed? Switch it off and look for a run that breaks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from simulation.schedules import Schedule, schedule_of
from simulation.sweep import FIRST_BASE, base_schedule, run_single, single_faults
from simulation.world import Result, run

SEED_PROFILES = ("few", "crawl", "race", "mixed", "poison", "lossy", "tiny", "outages", "freezes", "deaths")


def breaks(schedule: Schedule, rule: str) -> Result | None:
    """The run without the rule, if it breaks an invariant."""
    schedule = replace(schedule, switched_off=(rule,))
    result = run_single(schedule) if schedule.seed >= FIRST_BASE else run(schedule)
    return result if result.violation is not None else None


def candidates(seeds: Iterable[int], bases: Iterable[int] = range(4)) -> Iterator[Schedule]:
    """Runs that may break without some rule: single faults first, then seeds of every profile."""
    for number in bases:
        yield base_schedule(number)
        yield from single_faults(number)
    for seed in seeds:
        yield schedule_of(seed)
        for profile in SEED_PROFILES:
            yield schedule_of(seed, profile)
