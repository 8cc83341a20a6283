"""The router's brain: one pure core. Events in, commands out; `wake_at` says when to send Tick.

It routes each event to the request, worker or batch that it is about, and closes every event the same way: serve the
queue, ask for what was lost, look after the fleet. What happens to a request is `lifecycle`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from splitserve.config import RoutingSettings
from splitserve.errors import BusUnavailable, NoWorkers, SplitserveError
from splitserve.protocol.effects import Answered, BusDown, BusUp, Received, Tick, Unanswered
from splitserve.protocol.messages import (
    Beat,
    Digest,
    KvFailed,
    KvLoaded,
    KvReady,
    Ping,
    Preempted,
    RenewAnswer,
    TokenFrame,
)
from splitserve.protocol.states import RequestState, Role, is_probe
from splitserve.protocol.subjects import Subjects
from splitserve.router import admission, digests
from splitserve.router.account import Worker
from splitserve.router.chores import Chores, FinAckTimer, RenewTimer
from splitserve.router.desk import Desk, LifeTimer, Queue
from splitserve.router.effects import Deliver, Leave, RouterCommand, RouterEvent, Stop, Submit
from splitserve.router.fleet import Fleet
from splitserve.router.generation import Done, Submission
from splitserve.router.inbox import Inbox
from splitserve.router.lifecycle import Lifecycle
from splitserve.router.lives import Lives
from splitserve.router.outbox import Outbox
from splitserve.router.patience import due
from splitserve.router.replies import PingTag, Replies
from splitserve.router.rules import Rules
from splitserve.router.scout import Scout

PING_S = 0.3
SERVE_AGAIN_S = 0.1  # the queue is looked at again while somebody waits
BUS_AWAY_S = 15.0


@dataclass(frozen=True, slots=True)
class CoreTimer:
    """`serve` the queue, `bus` away too long."""

    what: str


class RouterCore:
    """One router's life. `router`: its name on the bus, new at each start; `name` and `incarnation` stand in its beat."""

    def __init__(
        self,
        *,
        router: str,
        name: str,
        incarnation: int,
        subjects: Subjects,
        settings: RoutingSettings,
        rules: Rules | None = None,
        metrics_url: str = "",
    ) -> None:
        rules = rules or Rules()
        self.name, self.incarnation = name, incarnation
        self._metrics_url = metrics_url
        self._out = Outbox(router, subjects)
        self._fleet = Fleet((name, incarnation), rules)
        self._desk = Desk(
            settings=settings,
            rules=rules,
            outbox=self._out,
            fleet=self._fleet,
            inbox=Inbox(fresh_slots=rules.fresh_slots),
            chores=Chores(self._out),
            scout=Scout(self._fleet, settings),
            queue=Queue(),
        )
        self._lives = Lives(self._desk)
        self._replies = Replies(self._lives, self._desk)
        self._routes: dict[type, Callable[[Any], None]] = {
            Received: self._received,
            Answered: self._replies.answered,
            Unanswered: self._replies.unanswered,
            Tick: self._tick,
            BusDown: self._bus_down,
            BusUp: self._bus_up,
            Submit: self._submit,
            Stop: self._stop,
            Leave: self._leave,
        }
        self._messages: dict[type, Callable[[Any], None]] = {
            Beat: self._beat,
            TokenFrame: self._frame,
            KvReady: self._kv_ready,
            KvLoaded: self._kv_loaded,
            KvFailed: self._kv_failed,
            Preempted: self._preempted,
            Digest: self._digest,
            RenewAnswer: self._desk.chores.renew_answered,
        }

    # --- the core's border ---

    def handle(self, event: RouterEvent, now: float) -> list[RouterCommand]:
        """Commands that follow from an event, in the order to carry them out. Never raises: see `Crashed`."""
        self._out.now = now
        self._lives.guarded("", self._routes[type(event)], event)
        self._lives.guarded("", self._close_event)
        return self._out.take()

    def wake_at(self) -> float | None:
        """When Tick is due; None when nothing waits."""
        waits = [at for at in (self._out.timers.next_at(), self._fleet.wake_at(self._out.now)) if at is not None]
        return min(waits, default=None)

    def beat(self, now: float) -> Beat:
        """To be published on the beat subject every 500 ms, and heard again."""
        return Beat(
            self.name,
            Role.ROUTER,
            self.incarnation,
            running=len(self._lives),
            ready=not self._desk.bus_down,
            life=self._out.router,
            metrics_url=self._metrics_url,
        )

    def refusal(self, submission: Submission, now: float) -> SplitserveError | None:
        """Why a submission would not be admitted now; None when it would."""
        if self._desk.bus_down:
            return BusUnavailable("the bus is away: try again in a moment", retry_after_s=1.0)
        serving = self._fleet.serving(Role.DECODE, submission.model)
        if not serving:
            return NoWorkers(f"no decode worker serves {submission.model!r}: start one", retry_after_s=2.0)
        queue = self._desk.queue
        waiting = admission.Waiting(len(queue), queue.tokens)
        rate = sum(worker.prefill_rate for worker in serving)
        return admission.refusal(self._desk.settings, waiting, len(submission.ids), rate)

    # --- views, for metrics and status ---

    @property
    def fleet(self) -> Fleet:
        return self._fleet

    @property
    def counts(self) -> dict[str, int]:
        """Transitions (`queued->decoding`) and what else happened, since the start."""
        return dict(self._out.counts)

    @property
    def idle(self) -> bool:
        """No request lives."""
        return not self._lives

    @property
    def live(self) -> dict[str, RequestState]:
        """Requests without an end yet."""
        return {life.request.rid: life.request.state for life in self._lives}

    def oldest_age(self, now: float) -> float:
        """Age in seconds of the oldest request; 0 when there is none. Probes are nobody's."""
        return max((life.request.age(now) for life in self._lives if not is_probe(life.request.rid)), default=0.0)

    @property
    def waiting(self) -> admission.Waiting:
        return admission.Waiting(len(self._desk.queue), self._desk.queue.tokens)

    @property
    def held(self) -> dict[str, int]:
        """What is kept in memory beside the fleet: all zero when nothing lives and the last batches went out."""
        return {"lives": len(self._lives), "slots": len(self._desk.inbox), "timers": len(self._out.timers)}

    def lives(self) -> dict[str, Lifecycle]:
        """For invariant checks."""
        return {life.request.rid: life for life in self._lives}

    # --- requests ---

    def _submit(self, event: Submit) -> None:
        submission = event.submission
        error = self.refusal(submission, self._out.now)
        if error is not None:
            self._out.put(Deliver(submission.rid, Done(error), 0))
            return
        self._lives.begin(submission)

    def _stop(self, event: Stop) -> None:
        self._lives.act(event.rid, Lifecycle.stop, event.choice)

    def _leave(self, event: Leave) -> None:
        self._lives.act(event.rid, Lifecycle.leave, event.error)

    # --- messages ---

    def _received(self, event: Received) -> None:
        route = self._messages.get(type(event.message))
        if route is not None:
            route(event.message)

    def _beat(self, beat: Beat) -> None:
        self._lives.lose_worker(self._fleet.on_beat(beat, self._out.now))
        if beat.role != Role.ROUTER and len(self._desk.queue):
            self._desk.queue.serve = True

    def _frame(self, frame: TokenFrame) -> None:
        worker = (frame.worker, frame.incarnation)
        self._fleet.heard(worker, self._out.now)
        if self._desk.inbox.advance(worker, frame.stream_seq, frame=True) and self._desk.rules.resume_gaps:
            self._lives.frames_lost(worker)
        for row in frame.rows():
            owner = self._desk.inbox.owner(row.slot)
            if owner is not None:
                self._lives.act(owner.rid, Lifecycle.row, owner.choice, row)

    def _kv_ready(self, message: KvReady) -> None:
        handle = message.handle
        self._fleet.heard((handle.owner, handle.incarnation), self._out.now)
        wanted = False

        def take(life: Lifecycle) -> None:
            nonlocal wanted
            wanted = life.kv_ready(message)

        self._lives.act(handle.rid, take)
        if not wanted:
            self._desk.chores.release(handle.owner, handle.id, handle.token, message.trace)

    def _kv_loaded(self, message: KvLoaded) -> None:
        self._lives.act(message.rid, Lifecycle.kv_loaded, message)

    def _kv_failed(self, message: KvFailed) -> None:
        self._lives.act(message.rid, Lifecycle.kv_failed, message)

    def _preempted(self, message: Preempted) -> None:
        self._lives.act(message.rid, Lifecycle.preempted, message.worker, message.da)

    def _digest(self, digest: Digest) -> None:
        worker = (digest.worker, digest.incarnation)
        if self._fleet.in_life(worker) is None:
            return  # not met yet, or of a former life
        self._fleet.heard(worker, self._out.now)
        digests.reconcile(digest, self._lives, self._desk)

    # --- our own bus ---

    def _bus_down(self, _: BusDown) -> None:
        self._desk.bus_down = True
        self._fleet.on_bus(down=True)
        self._out.timers.set(CoreTimer("bus"), self._out.now + BUS_AWAY_S)

    def _bus_up(self, _: BusUp) -> None:
        self._desk.bus_down = False
        self._fleet.on_bus(down=False)
        self._out.timers.clear(CoreTimer("bus"))
        self._lives.ask_again()
        self._desk.queue.serve = True

    # --- time ---

    def _tick(self, _: Tick) -> None:
        for key in self._out.timers.take_due(self._out.now):
            if isinstance(key, LifeTimer):
                self._lives.act(key.rid, lambda life, key=key: due(life, key.wait, self._desk))
            elif isinstance(key, FinAckTimer):
                self._desk.chores.send_fin_acks(key.life)
            elif isinstance(key, RenewTimer):
                self._desk.chores.renew()
            elif isinstance(key, CoreTimer):
                self._core_timer(key.what)

    def _core_timer(self, what: str) -> None:
        if what == "bus":
            self._lives.end_all(BusUnavailable(f"the bus has been away for {BUS_AWAY_S:g} s", retry_after_s=5.0))
        elif what == "serve":
            self._desk.queue.serve = True

    def _close_event(self) -> None:
        """The end of every event."""
        ping, lost = self._fleet.judge(self._out.now)
        for worker in lost:
            self._lives.lose_worker(worker)
        if self._desk.bus_down:
            return
        for worker in ping:
            self._ping(worker)
        if self._desk.queue.serve:
            self._lives.place_waiting()
            if len(self._desk.queue):
                self._out.timers.set(CoreTimer("serve"), self._out.now + SERVE_AGAIN_S)
        self._lives.move_waiting()
        self._lives.ask_for_gaps()

    def _ping(self, worker: Worker) -> None:
        subject = self._out.subjects.worker_in(worker.beat.name)
        self._out.ask(subject, Ping(worker.beat.incarnation), PING_S, PingTag(worker.life))
