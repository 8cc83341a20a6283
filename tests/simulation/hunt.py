"""Is a rule needed? Switch it off and look for a run that breaks, or at least for one that costs more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from simulation.plan import Schedule
from simulation.schedules import schedule_of
from simulation.sweep import FIRST_BASE, base_schedule, run_single, single_faults
from simulation.world import Result, run

SEED_PROFILES = ("few", "crawl", "race", "mixed", "poison", "lossy", "tiny", "outages", "freezes", "deaths")


def breaks(schedule: Schedule, rule: str) -> Result | None:
    """The run without the rule, if it breaks an invariant."""
    schedule = replace(schedule, switched_off=(rule,))
    result = run_single(schedule) if schedule.seed >= FIRST_BASE else run(schedule)
    return result if result.violation is not None else None


LATER_S = 0.4  # an answer; step times alone make less of a difference
MORE_TOKENS = 12


def dearer(schedule: Schedule, rule: str) -> str | None:
    """What this run costs more without the rule, in words: time of an answer, work done twice, blocks held longer."""
    with_rule, without = run(schedule), run(replace(schedule, switched_off=(rule,)))
    if with_rule.violation is not None or without.violation is not None:
        return None
    if any(a.outcome != b.outcome for a, b in zip(with_rule.clients, without.clients, strict=True)):
        return None
    later_s = without.cost.answers_s - with_rule.cost.answers_s
    tokens = without.cost.tokens - with_rule.cost.tokens
    held_s = without.cost.held_s - with_rule.cost.held_s
    if later_s >= LATER_S:
        return f"answers {later_s:.1f} s later"
    if tokens >= MORE_TOKENS:
        return f"{tokens} tokens computed again"
    return f"held {held_s:.1f} s longer" if held_s >= 2.0 else None


def candidates(seeds: Iterable[int], bases: Iterable[int] = range(4)) -> Iterator[Schedule]:
    """Runs that may break without some rule: single faults first, then seeds of every profile."""
    for number in bases:
        yield base_schedule(number)
        yield from single_faults(number)
    for seed in seeds:
        yield schedule_of(seed)
        for profile in SEED_PROFILES:
            yield schedule_of(seed, profile)
