"""The router's process: its core, the clients behind its HTTP door, and its writer to the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulation.client import Client
from simulation.invariants import Violation, require
from simulation.process import Process
from splitserve.protocol.effects import Answered, Received, Unanswered
from splitserve.protocol.states import RequestState, Role
from splitserve.router.core import RouterCore
from splitserve.router.effects import Crashed, Deliver, Leave, Save, Stop, Submit
from splitserve.router.generation import Submission
from splitserve.router.records import Record

if TYPE_CHECKING:
    from simulation.world import World

BEAT_S = 0.5
COMMIT_S = 0.02
MODEL = "toy"


class RouterProcess(Process):
    """One life of the router; `name` is that life's, as on the bus."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.core = self.router = RouterCore(
            router=name,
            name="router",  # the stable one, which every life of it shares
            incarnation=world.rng.getrandbits(63),
            subjects=world.subjects,
            settings=world.routing,
            rules=world.router_rules,
        )
        self.clients: dict[str, Client] = {}
        self.states: dict[str, Record] = {}
        self._unsaved: dict[str, Record] = {}
        self.acts[Deliver] = self._deliver
        self.acts[Save] = self._save
        self.acts[Crashed] = self._crashed

    def start(self) -> None:
        self.subscribe(self.world.subjects.router_events(self.name))
        self.subscribe_beats(self.world.subjects.all_beats)
        self.later(self.world.rng.random() * 0.05, self._beat)

    def _beat(self) -> None:
        subject = self.world.subjects.beat(Role.ROUTER, self.name)
        self.world.bus.publish(self.beats, subject, self.router.beat(self.now))
        self.later(BEAT_S, self._beat)

    # --- clients ---

    def submit(self, client: Client) -> None:
        plan = client.plan
        client.submitted = True
        client.began_at = self.world.clock.now
        self.handle(Submit(Submission(client.rid, MODEL, plan.ids, plan.params, plan.seeds, plan.timeout_s)))

    def leave(self, client: Client) -> None:
        """The socket closed. Nothing is owed to this client any more."""
        client.gone = True
        self.handle(Leave(client.rid))

    def _deliver(self, command: Deliver) -> None:
        client = self.clients[command.rid]
        choice = client.take(command.event, self.world.clock.now)
        if choice is not None:
            client.stopped.add(choice)
            self.later(0.0, self.handle, Stop(command.rid, choice))

    def _crashed(self, command: Crashed) -> None:
        raise Violation("cores_are_total", f"the router's core raised on {command.rid}") from command.error

    # --- the store ---

    def _save(self, command: Save) -> None:
        record = command.record
        if not self._unsaved:
            self.later(COMMIT_S, self._commit)
        self._unsaved[record.rid] = record

    def _commit(self) -> None:
        rows, self._unsaved = self._unsaved, {}
        for record in rows.values():
            taken = self.world.redis.save(record.row(), self.world.clock.now)
            require(taken, "the_store_takes_the_owners_writes", f"{record} was refused")

    # --- what is counted and watched ---

    def handled(self, event: Any, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, Save):
                self._moved(event, command.record)
        if any(c.submitted and c.done is None and not c.gone for c in self.clients.values()):
            require(self.core.wake_at() is not None, "every_live_request_has_a_timer", f"{self.name} has none")

    def _moved(self, event: Any, record: Record) -> None:
        old = self.states.get(record.rid)
        before = old.state if old is not None else "(new)"
        self.states[record.rid] = record
        if old is not None:
            one_way(old, record)
        self.world.journal.count("request table", f"{before} + {_cause(event)} -> {record.state}")


def one_way(old: Record, new: Record) -> None:
    """Invariants 4, 5 and 12: attempts and seq only rise, and a terminal state is the last."""
    rule = "a_record_only_goes_forward"
    require(not old.state.terminal, rule, f"{old.rid} was {old.state}, then {new.state}")
    require(new.seq > old.seq, rule, f"{old.rid}: seq {old.seq}, then {new.seq}")
    require(new.pa >= old.pa and new.da >= old.da, rule, f"{old.rid}: attempts went back: {old}, {new}")
    require(new.n_out >= old.n_out, rule, f"{old.rid}: {old.n_out} tokens, then {new.n_out}")


def _cause(event: Any) -> str:
    """An event as the request table names it."""
    if isinstance(event, Received):
        return type(event.message).__name__
    if isinstance(event, Answered):
        return f"{getattr(event.tag, 'kind', type(event.tag).__name__)} {type(event.message).__name__}"
    if isinstance(event, Unanswered):
        return f"{getattr(event.tag, 'kind', type(event.tag).__name__)} {event.why}"
    return type(event).__name__


LIVE = tuple(state for state in RequestState if not state.terminal)
