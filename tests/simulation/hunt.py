"""Is a rule needed? Switch it off where it has work to do, and look for a run that breaks, or at least costs more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random

from simulation.faults import Network
from simulation.plan import ClientPlan, Event, Fate, Schedule
from simulation.schedules import schedule_of
from simulation.world import run

LATER_S = 0.5  # an answer; step times alone make less of a difference
MORE_TOKENS = 16
LONGER_S = 2.0


@dataclass(frozen=True, slots=True)
class Blow:
    """One event for each client, soon after it came, `seconds` long (least, most)."""

    fate: Fate
    target: str  # a worker whose name begins so, or the router
    seconds: tuple[float, float]
    within_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Focus:
    """Runs of a profile in which a rule has work to do. Without a network and blow of its own, the profile's."""

    profile: str
    network: Network | None = None
    blow: Blow | None = None
    cluster: Mapping[str, object] = field(default_factory=dict[str, object])
    leave_within_s: float = 0.0  # every other client leaves
    costs: bool = False  # nothing breaks, but time or work is lost
    seeds: int = 60

    def schedules(self) -> Iterator[Schedule]:
        for seed in range(self.seeds):
            yield self._sharpened(schedule_of(seed, self.profile), Random(f"focus {seed}"))

    def _sharpened(self, schedule: Schedule, rng: Random) -> Schedule:
        cluster = replace(schedule.cluster, **self.cluster)
        schedule = replace(schedule, cluster=cluster, long=False)
        if self.network is not None or self.blow is not None:
            schedule = replace(schedule, network=self.network or Network(), events=(), singles=())
        if self.blow is not None:
            events = tuple(_strike(self.blow, client, schedule, rng) for client in schedule.clients)
            schedule = replace(schedule, events=events)
        if self.leave_within_s:
            clients = tuple(
                replace(c, leaves_at=c.at + rng.uniform(0, self.leave_within_s) if n % 2 else None)
                for n, c in enumerate(schedule.clients)
            )
            schedule = replace(schedule, clients=clients)
        return schedule


def _strike(blow: Blow, client: ClientPlan, schedule: Schedule, rng: Random) -> Event:
    counts = {"prefill": schedule.cluster.prefill, "decode": schedule.cluster.decode}
    target = f"{blow.target}-{rng.randrange(counts[blow.target])}" if blow.target in counts else blow.target
    return Event(client.at + rng.uniform(0, blow.within_s), blow.fate, target, rng.uniform(*blow.seconds))


def harm(rule: str, focus: Focus) -> tuple[Schedule, str] | None:
    """The first run of the focus that breaks without the rule (or costs more), and how."""
    for schedule in focus.schedules():
        found = dearer(schedule, rule) if focus.costs else breaks(schedule, rule)
        if found is not None:
            return schedule, found
    return None


def breaks(schedule: Schedule, rule: str) -> str | None:
    """Which invariant breaks without the rule; None when none does."""
    violation = run(replace(schedule, switched_off=(rule,))).violation
    return None if violation is None else str(violation)


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
    return f"held {held_s:.1f} s longer" if held_s >= LONGER_S else None
