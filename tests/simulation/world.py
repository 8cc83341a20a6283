"""The whole cluster in one process and in virtual time: the real cores and engine, a toy model, a lossy bus.

Built the way FoundationDB and TigerBeetle test: everything that decides is deterministic, everything else is here and
hangs on one seed. `run` plays a schedule and tells what broke.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cache
from random import Random

from simulation.bus import Bus
from simulation.client import Client
from simulation.clock import Clock
from simulation.endings import (
    a_poison_is_found_out,
    every_error_has_a_cause,
    every_request_ended_in_time,
    everything_is_given_back,
    nobody_queues_for_ever,
)
from simulation.fates import befall, poisoned
from simulation.faults import MessageFaults, Network
from simulation.invariants import Violation, require
from simulation.journal import Journal
from simulation.plan import Schedule
from simulation.process import Process
from simulation.reference import Reference
from simulation.router import RouterProcess
from simulation.store import ToyRedis
from simulation.worker import DecodeWorker, PrefillWorker, Worker
from splitserve.config import RoutingSettings
from splitserve.protocol.messages import KvReady
from splitserve.protocol.subjects import Subjects
from splitserve.router import rules as router_rules
from splitserve.worker import rules as worker_rules

ROUTER = "router"
KNOWN_S = 0.55  # all have sent a beat
LOOK_S = 0.5  # how often it is looked whether all is over
PATIENCE_S = 14.0  # for everything to be given back, after leases: a dead router is noticed after 5 s of silence


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took: seconds until answers ended, tokens computed by all workers, seconds from the last answer until
    nothing was held any more."""

    answers_s: float
    tokens: int
    held_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """What one run gave."""

    schedule: Schedule
    violation: Violation | None
    journal: Journal
    clients: tuple[Client, ...]
    messages: int  # that single faults count
    cost: Cost


class World:
    """One run."""

    def __init__(self, schedule: Schedule, journal: Journal) -> None:
        self.schedule = schedule
        self.cluster = schedule.cluster
        self.journal = journal
        self.rng = Random(f"world {schedule.seed}")
        self.clock = Clock()
        self.subjects = Subjects("sim")
        self.faults = MessageFaults(Random(f"network {schedule.seed}"), Network(), schedule.singles)
        self.bus = Bus(self.clock, self.faults, journal, self.subjects.all_beats, as_bytes=schedule.long)
        self.redis = ToyRedis()
        self.router_rules, self.worker_rules = _rules(schedule.switched_off)
        self.routing = _settings(schedule.cluster.split, schedule.cluster.queue_timeout_s)
        self.processes: dict[str, Process] = {}
        self.clients: list[Client] = []
        self.plans = {f"r{number}": plan for number, plan in enumerate(schedule.clients)}
        self.deaths: Counter[str] = Counter()  # rid -> workers that it killed
        self.lives: list[Worker] = []  # of all workers, dead ones too
        self.held_s = 0.0  # from the last answer on
        self.bus_up_at = 0.0
        self.frozen_s = 0.0  # of the router, in all
        self._lives = 0
        self._first_tokens: dict[tuple[str, int], tuple[int, ...]] = {}

    @property
    def router(self) -> RouterProcess:
        """The router's present (or last) life."""
        found = self.processes[ROUTER]
        assert isinstance(found, RouterProcess)
        return found

    @property
    def workers(self) -> list[Worker]:
        return [process for process in self.processes.values() if isinstance(process, Worker)]

    # --- the run ---

    def play(self) -> None:
        """Raises `Violation`."""
        schedule, clock = self.schedule, self.clock
        for name in [ROUTER, *(f"prefill-{i}" for i in range(schedule.cluster.prefill))]:
            self.start(name)
        for i in range(schedule.cluster.decode):
            self.start(f"decode-{i}")
        clock.at(KNOWN_S, self.faults.become, schedule.network)  # once all know each other
        reference = Reference(schedule.cluster.free_variant)
        for number, plan in enumerate(schedule.clients):
            client = Client(f"r{number}", plan, reference)
            self.clients.append(client)
            clock.at(plan.at, self._submit, client)
        for event in schedule.events:
            clock.at(event.at, befall, self, event)
        self._play_out()

    def _play_out(self) -> None:
        """Until all clients have their answers, then with a good network until all is given back."""
        schedule, clock = self.schedule, self.clock
        last_event = max((event.at + event.seconds + 2.0 for event in schedule.events), default=0.0)
        deadline = max(schedule.last_deadline + self.frozen_s, last_event) + 2.0
        while clock.now < deadline and (clock.now < last_event or not self._answered()):
            clock.run(clock.now + LOOK_S)
            deadline = max(schedule.last_deadline + self.frozen_s, last_event) + 2.0
        for client in self.clients:
            every_request_ended_in_time(client, clock.now, self.frozen_s)
            every_error_has_a_cause(client, schedule)
            others = sum(bool(other.plan.poison) for other in self.clients if other is not client)
            a_poison_is_found_out(client, self.deaths[client.rid], others)
            nobody_queues_for_ever(
                client, self.router.states.get(client.rid), self.routing.queue_timeout + self.frozen_s
            )
            self.journal.count("requests", client.outcome)
        self.faults.become(Network())
        answered_at = clock.now
        latest = clock.now + schedule.cluster.lease_ttl_s + PATIENCE_S
        while clock.now < latest and everything_is_given_back(self, schedule.long) is not None:
            clock.run(clock.now + LOOK_S)
        self.held_s = clock.now - answered_at
        if schedule.long:
            clock.run(max(clock.now, latest) + 61.0)
        held = everything_is_given_back(self, schedule.long)
        require(held is None, "everything_is_given_back", held or "")

    def _answered(self) -> bool:
        return all(client.gone or client.done is not None for client in self.clients) and len(self.clients) > 0

    # --- what happens in it ---

    def start(self, name: str) -> None:
        """A new life under a name. A router's life has a name of its own."""
        self._lives += 1
        process: Process
        if name == ROUTER:
            process = RouterProcess(self, f"router-{self._lives}")
        elif name.startswith("prefill"):
            process = PrefillWorker(self, name)
        else:
            process = DecodeWorker(self, name)
        self.processes[name] = process
        if isinstance(process, Worker):
            self.lives.append(process)
        self.journal.write(self.clock.now, name, "starts", process.name)
        process.start()
        if self.bus_up_at > self.clock.now:  # it is there, and waits for the server
            self.bus.cut(process.connection)
            self.bus.cut(process.beats)
            self.clock.at(self.bus_up_at + 0.1, process.bus_up)

    def cost(self) -> Cost:
        """So far."""
        answers_s = sum(client.done_at - client.began_at for client in self.clients if client.done is not None)
        return Cost(answers_s, sum(worker.runner.computed_tokens for worker in self.lives), self.held_s)

    def _submit(self, client: Client) -> None:
        router = self.router
        if not router.alive:
            client.gone = True
            return
        router.clients[client.rid] = client
        router.soon(router.submit, client)
        if client.plan.leaves_at is not None:
            self.clock.at(client.plan.leaves_at, router.soon, self._leave, router, client)

    @staticmethod
    def _leave(router: RouterProcess, client: Client) -> None:
        if client.done is None and not client.gone:
            router.leave(client)

    def taken(self, worker: Worker, rid: str) -> None:
        """A worker begins with a request. Some requests kill it."""
        plan = self.plans[rid]
        if plan.poison and worker.name.startswith(plan.poison):
            self.deaths[rid] += 1
            self.clock.after(0.001, poisoned, self, worker)

    def one_first_token(self, ready: KvReady) -> None:
        """Invariant 8: a prefill attempt has one first token, whoever computes it and however often."""
        key = (ready.handle.rid, ready.handle.pa)
        known = self._first_tokens.setdefault(key, ready.first_ids)
        require(known == ready.first_ids, "one_first_token_an_attempt", f"{key}: {known}, then {ready.first_ids}")


@cache
def _settings(split: str, queue_timeout_s: float) -> RoutingSettings:
    """One object a combination: to make one costs as much as a short run."""
    return RoutingSettings.model_validate({"split": split, "queue_timeout": queue_timeout_s})


def _rules(switched_off: tuple[str, ...]) -> tuple[router_rules.Rules, worker_rules.Rules]:
    """Both cores' rules without those named `router.<rule>` or `worker.<rule>`."""
    router, worker = router_rules.Rules(), worker_rules.Rules()
    for name in switched_off:
        core, _, rule = name.partition(".")
        if core == "router":
            router = replace(router, **{rule: False})
        else:
            worker = replace(worker, **{rule: False})
    return router, worker


def all_rules() -> list[str]:
    """Every safety rule of the cores, as `switched_off` names it."""
    return [f"router.{f.name}" for f in fields(router_rules.Rules)] + [
        f"worker.{f.name}" for f in fields(worker_rules.Rules)
    ]


def run(schedule: Schedule, *, keep: bool = False) -> Result:
    """Play a schedule. `keep` keeps every event's line. Any error of a core is a violation too."""
    journal = Journal(keep)
    world = World(schedule, journal)
    violation: Violation | None = None
    try:
        world.play()
    except Violation as found:
        violation = found
    except Exception as error:  # noqa: BLE001  # a core that raises has broken the first rule: handle is total
        violation = Violation("cores_are_total", f"{type(error).__name__}: {error}")
        violation.__cause__ = error
    if violation is not None:
        journal.write(world.clock.now, "VIOLATION", violation.rule, violation)
    return Result(schedule, violation, journal, tuple(world.clients), world.faults.counted, world.cost())
