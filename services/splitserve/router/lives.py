"""All live requests of a router: acting on one, on those of a worker, on all. A fault of one costs no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVarTuple

from splitserve.errors import SplitserveError
from splitserve.protocol.messages import ResumeRow
from splitserve.router.account import Life
from splitserve.router.desk import Desk
from splitserve.router.effects import Crashed, Deliver
from splitserve.router.generation import Done, Submission
from splitserve.router.legs import JobKind, JobTag
from splitserve.router.lifecycle import Lifecycle

P = ParamSpec("P")
Ts = TypeVarTuple("Ts")


class Lives:
    """By request id. What has ended is not here."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._lives: dict[str, Lifecycle] = {}

    def __len__(self) -> int:
        return len(self._lives)

    def __iter__(self) -> Iterator[Lifecycle]:
        """Those of now: they may end meanwhile."""
        return iter(tuple(self._lives.values()))

    def get(self, rid: str) -> Lifecycle | None:
        return self._lives.get(rid)

    def begin(self, submission: Submission) -> None:
        self._lives[submission.rid] = Lifecycle(submission, self._desk)

    # --- one ---

    def act(self, rid: str, act: Callable[[Lifecycle, *Ts], object], *args: *Ts) -> None:
        """Act on a request if it lives. An exception ends this request alone."""
        life = self._lives.get(rid)
        if life is None:
            return
        try:
            act(life, *args)
        except Exception as error:  # noqa: BLE001  # as in `guarded`, without a second call for each token
            self._crashed(rid, error)
        if not life.request.live:
            self._lives.pop(rid, None)

    def guarded(self, rid: str, act: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call; what it raises becomes `Crashed`, and the end of request `rid` if there is one."""
        try:
            act(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # whatever it is must not end the others; the shell logs it
            self._crashed(rid, error)

    def _crashed(self, rid: str, error: Exception) -> None:
        self._desk.outbox.put(Crashed(rid, error))
        self._bury(rid, SplitserveError(f"the router failed under this request: {error}"))

    def _bury(self, rid: str, error: SplitserveError) -> None:
        """End a request whose own code raised, even if that code raises again: the client gets its end."""
        life = self._lives.pop(rid, None)
        if life is None:
            return
        try:
            life.fail(error)
        except Exception as again:  # noqa: BLE001
            self._desk.outbox.put(Crashed(rid, again))
            self._desk.outbox.put(Deliver(rid, Done(error), 0))

    def asked_worker(self, tag: JobTag) -> Life:
        """The worker that a question went to; nobody if the request has moved on."""
        life = self._lives.get(tag.rid)
        if life is not None:
            prefill, decode = life.request.prefill, life.request.decode
            if tag.kind is JobKind.PREFILL and prefill is not None and prefill.pa == tag.number:
                return prefill.life
            if tag.kind is not JobKind.PREFILL and decode is not None and decode.da == tag.number:
                return decode.life
        return ("", 0)

    # --- a worker's ---

    def lose_worker(self, worker: Life | None) -> None:
        """A worker's life is over, if there is one: its requests go on elsewhere."""
        if worker is None:
            return
        desk = self._desk
        desk.outbox.counts["worker_lost"] += 1
        desk.chores.forget(worker)
        if desk.fleet.in_life(worker) is None:
            desk.inbox.forget(worker)
        for life in self:
            prefill, decode = life.request.prefill, life.request.decode
            if prefill is not None and prefill.life == worker:
                self.act(life.request.rid, Lifecycle.lose_prefill, "worker lost")
            if decode is not None and decode.life == worker:
                self.act(life.request.rid, Lifecycle.lose_decode, "worker lost")

    def unknown(self, worker: Life, rows: Iterable[tuple[str, int]]) -> None:
        """A worker does not hold these (rid, attempt)."""
        for rid, attempt in rows:
            self.act(rid, Lifecycle.unknown_at, worker, attempt)

    def frames_lost(self, worker: Life) -> None:
        """Frames of this worker were lost: every request there is asked for."""
        for life in self:
            decode = life.request.decode
            if decode is not None and decode.life == worker:
                self._desk.chores.gap(worker, life.request.rid)

    # --- all ---

    def ask_again(self) -> None:
        """Our bus is back: unanswered jobs again, and whatever was lost meanwhile, everywhere."""
        for life in self:
            self.act(life.request.rid, Lifecycle.ask_again)
        for life in self:
            decode, prefill = life.request.decode, life.request.prefill
            if decode is not None:
                self._desk.chores.gap(decode.life, life.request.rid)
            if prefill is not None and prefill.job is not None:
                self._desk.chores.gap(prefill.life, life.request.rid)

    def ask_for_gaps(self) -> None:
        """One Resume for each worker from which something was lost, and that is not being asked already."""
        for worker, rids in self._desk.chores.gaps_to_ask():
            rows: list[ResumeRow] = []
            for rid in rids:
                life = self._lives.get(rid)
                if life is not None:
                    rows.extend(life.request.resume_rows(worker))
            if rows:
                self._desk.outbox.counts["resumes"] += 1
                self._desk.chores.resume(worker, tuple(rows))

    def place_waiting(self) -> None:
        """First come, first served: one that finds no room stops the rest, so that large ones do not starve."""
        self._desk.queue.serve = False
        for rid in self._desk.queue.in_order():
            life = self._lives.get(rid)
            if life is None or life.request.decode is not None:
                continue
            room = True

            def place(life: Lifecycle) -> None:
                nonlocal room
                room = life.place()

            self.act(rid, place)
            if not room:
                return

    def move_waiting(self) -> None:
        """Who has nothing to read takes a prompt that waits elsewhere: a worker that joined, or one that is through."""
        fleet, now = self._desk.fleet, self._desk.now
        for there in [worker for worker in fleet if worker.hungry]:
            there.hungry = False
            if not there.free:
                continue
            waiting = [(here, *found) for here in fleet for found in here.waiting(now)]
            for here, (rid, _), before in waiting:
                self.act(rid, Lifecycle.wait_no_longer, here, before, there)
                if not there.free:
                    break

    def end_all(self, error: SplitserveError) -> None:
        for life in self:
            self.act(life.request.rid, Lifecycle.fail, error)
