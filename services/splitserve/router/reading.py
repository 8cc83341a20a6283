"""Where one request's prompt is read: planned, asked for, and read elsewhere after all."""

from __future__ import annotations

from splitserve.protocol.states import Role
from splitserve.router.account import Worker
from splitserve.router.courier import Courier
from splitserve.router.desk import Desk
from splitserve.router.endings import Endings
from splitserve.router.legs import DecodeLeg, PrefillLeg, prefill_leg
from splitserve.router.request import Request


class Reading:
    """The readers of one request. A prompt that decode reads itself has no `PrefillLeg`."""

    __slots__ = ("_courier", "_desk", "_endings", "_request")

    def __init__(self, request: Request, courier: Courier, endings: Endings, desk: Desk) -> None:
        self._request = request
        self._courier = courier
        self._endings = endings
        self._desk = desk

    def plan(self, worker: Worker | None) -> PrefillLeg | None:
        """Promised at once, before it is asked: else all of a burst would find the worker free."""
        if worker is None:
            return None
        r = self._request
        leg = prefill_leg(worker, r.pa, r.transcript.snapshot())
        self._courier.promise_prefill(leg, self._desk.scout.prefill_load(r.wish, r.context, worker))
        return leg

    def ask(self, leg: PrefillLeg, decode: DecodeLeg) -> None:
        self._request.prefill_name = leg.life[0]
        self._courier.ask_prefill(leg, decode)
        self._request.stages.prefill_asked(self._desk.now)

    def again(self, reader: Worker | None, decode: DecodeLeg) -> None:
        """pa+1 with this prefill worker and an Amend for the reservation; None: decode reads the prompt."""
        r, desk = self._request, self._desk
        r.pa += 1
        r.prefill = self.plan(reader)
        if desk.rules.amend_new_number:
            r.da += 1
        r.transcript.forget_heard()
        r.count("amended_remote" if r.prefill else "amended_local")
        self._courier.amend(decode, r.da, r.pa, r.prefill.source if r.prefill else None, r.transcript.snapshot())
        worker = desk.fleet.in_life(decode.life)
        if worker is not None:  # what it promised: the prompt is now its own to read, or no longer
            load = desk.scout.decode_load(r.wish, r.context, worker, local=r.prefill is None)
            self._courier.promise_decode(decode, load)
        if r.prefill is not None:
            self.ask(r.prefill, decode)

    def move(self, here: Worker, before: int, there: Worker) -> None:
        """Have the prompt, which waits `here` behind so many tokens, read `there` if that is sooner."""
        r, desk, decode = self._request, self._desk, self._request.decode
        if decode is None or not decode.accepted or not self._waits:
            return
        writer = desk.fleet.in_life(decode.life)
        if writer is None or (there is not writer and there.beat.role != Role.PREFILL):
            return
        if not desk.scout.sooner(r.wish, r.context, here, before, there, writer, desk.now):
            return
        r.count("replaced|prefill|moved")
        r.stages.moved(desk.now)
        self._endings.drop_prefill("moved")
        self.again(None if there is writer else there, decode)

    @property
    def _waits(self) -> bool:
        """Nothing of the prompt is read, as far as we know."""
        r = self._request
        if r.kv is not None or len(r.transcript):
            return False
        return r.prefill is None or (r.prefill.accepted and r.prefill.tokens_done <= 0)
