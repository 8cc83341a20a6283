"""Says to workers what a request's life decides, and keeps the fleet's account of it."""

from __future__ import annotations

from splitserve.protocol.handle import KvSource
from splitserve.protocol.messages import Amend, Cancel, KvReady
from splitserve.router.account import Load, Worker
from splitserve.router.desk import Desk
from splitserve.router.generation import Submission
from splitserve.router.legs import (
    ASK_S,
    DecodeLeg,
    PrefillLeg,
    decode_job,
    prefill_job,
)

Outputs = tuple[tuple[int, ...], ...]


class Courier:
    """The messages of one request."""

    def __init__(self, submission: Submission, desk: Desk) -> None:
        self._sub = submission
        self._desk = desk
        self._ends_at = desk.now + submission.timeout_s

    @property
    def _ttl_s(self) -> float:
        return max(0.0, self._ends_at - self._desk.now)

    # --- decode ---

    def ask_decode(self, worker: Worker, da: int, pa: int, source: KvSource | None, outputs: Outputs) -> DecodeLeg:
        """Reserve: slots are new with each worker, so an old slot can mean nothing to a new one."""
        rid, n = self._sub.rid, len(self._sub.seeds)
        slot = self._desk.inbox.open(rid, n)
        job = decode_job(
            self._sub,
            self._desk.outbox.router,
            worker,
            da=da,
            pa=pa,
            slot=slot,
            source=source,
            outputs=outputs,
            ttl_s=self._ttl_s,
        )
        leg = DecodeLeg(worker.life, slot, job)
        self._send(leg)
        return leg

    def amend(self, leg: DecodeLeg, da: int, pa: int, source: KvSource | None, outputs: Outputs) -> None:
        """The same worker, slots and reservation, another content."""
        leg.job = Amend(
            self._sub.rid, self._desk.outbox.router, leg.life[1], da, pa, source, outputs, self._ttl_s, self._sub.trace
        )
        leg.accepted, leg.tries = False, 1
        self._send(leg)

    def ask_decode_again(self, leg: DecodeLeg) -> None:
        """The same number, so the same answer."""
        leg.tries += 1
        self._send(leg)

    def _send(self, leg: DecodeLeg) -> None:
        self._desk.outbox.ask(self._desk.outbox.subjects.worker_in(leg.life[0]), leg.job, ASK_S, leg.tag)

    def drop_decode(self, leg: DecodeLeg, reason: str, *, cancel: bool = True) -> None:
        """Forget a decode worker; `cancel` ends what it has of us."""
        self._desk.inbox.close(leg.slot, len(self._sub.seeds))
        self._promise(leg.life, leg.slot, None)
        self._desk.queue.serve = True
        if cancel:
            message = Cancel(self._sub.rid, leg.life[1], pa=0, da=leg.da, reason=reason, trace=self._sub.trace)
            self._desk.outbox.publish(self._desk.outbox.subjects.worker_in(leg.life[0]), message)

    def promise_decode(self, leg: DecodeLeg, load: Load) -> None:
        self._promise(leg.life, leg.slot, load)

    # --- prefill ---

    def ask_prefill(self, leg: PrefillLeg, decode: DecodeLeg) -> None:
        subjects = self._desk.outbox.subjects
        notify = (subjects.router_events(self._desk.outbox.router), subjects.worker_kv(decode.life[0]))
        leg.job = prefill_job(self._sub, self._desk.outbox.router, leg, notify, self._ttl_s)
        self._send_prefill(leg)

    def ask_prefill_again(self, leg: PrefillLeg) -> None:
        leg.tries += 1
        self._send_prefill(leg)

    def _send_prefill(self, leg: PrefillLeg) -> None:
        if leg.job is not None:
            subject = self._desk.outbox.subjects.worker_in(leg.life[0])
            self._desk.outbox.ask(subject, leg.job, ASK_S, leg.tag(self._sub.rid))

    def promise_prefill(self, leg: PrefillLeg, load: Load) -> None:
        self._promise(leg.life, leg.key, load)

    def drop_prefill(self, leg: PrefillLeg, kv: KvReady | None, reason: str, *, end: bool = True) -> None:
        """Forget a prefill worker; `end` frees what it computes (Cancel) or holds (Release)."""
        self._promise(leg.life, leg.key, None)
        if kv is not None:
            self._desk.chores.let_go(kv.handle)
        if not end or leg.job is None:
            return
        if kv is not None:
            self._desk.chores.release(kv.handle.owner, kv.handle.id, kv.handle.token, self._sub.trace)
        else:
            message = Cancel(self._sub.rid, leg.life[1], pa=leg.pa, da=0, reason=reason, trace=self._sub.trace)
            self._desk.outbox.publish(self._desk.outbox.subjects.worker_in(leg.life[0]), message)

    def forward(self, kv: KvReady, leg: DecodeLeg) -> None:
        """KvReady to a decode worker that may not have it."""
        self._desk.outbox.counts["kv_ready_forwarded"] += 1
        self._desk.outbox.publish(self._desk.outbox.subjects.worker_kv(leg.life[0]), kv)

    def _promise(self, life: tuple[str, int], key: int | str, load: Load | None) -> None:
        worker = self._desk.fleet.in_life(life)
        if worker is None:
            return
        if load is None:
            worker.drop((self._sub.rid, key), self._desk.now)
        else:
            worker.promise((self._sub.rid, key), load, self._desk.now)
