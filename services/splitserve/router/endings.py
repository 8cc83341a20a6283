"""How a request ends, and how a prefill of it is given up: workers let go, one terminal event to client and store."""

from __future__ import annotations

from splitserve.errors import RequestFailed, SplitserveError
from splitserve.protocol.states import RequestState
from splitserve.router.courier import Courier
from splitserve.router.desk import Desk, Wait
from splitserve.router.generation import Done
from splitserve.router.request import Request


class Endings:
    """The ends of one request."""

    def __init__(self, request: Request, courier: Courier, desk: Desk) -> None:
        self._request = request
        self._courier = courier
        self._desk = desk

    def finish(self, *, cancel: bool) -> None:
        """All answers are out. Without `cancel` decode has ended by itself and is told by FinAck."""
        self._end(RequestState.FINISHED, None, cancel=cancel)

    def leave(self) -> None:
        self._end(RequestState.CANCELLED, RequestFailed("the client left"), cancel=True)

    def fail(self, error: SplitserveError) -> None:
        self._end(RequestState.FAILED, error, cancel=True)

    def _end(self, state: RequestState, error: SplitserveError | None, *, cancel: bool) -> None:
        r = self._request
        if not r.live:
            return
        if r.decode is not None:
            self._courier.drop_decode(r.decode, str(state), cancel=cancel)
        if r.prefill is not None:
            self.drop_prefill(str(state))
        r.to(state, error)
        r.deliver(Done(error, r.cached_tokens or 0, r.stages.seconds(self._desk.now), r.preemptions))
        r.waits_no_more()
        for wait in Wait:
            self._desk.no_timer(r.rid, wait)

    def drop_prefill(self, cause: str, *, end: bool = True) -> None:
        """Forget the prefill and its handle; `end` frees what the worker computes or holds."""
        r = self._request
        if r.prefill is not None:
            self._courier.drop_prefill(r.prefill, r.kv, cause, end=end)
        r.prefill = r.kv = None
        self._desk.no_timer(r.rid, Wait.PROGRESS)
        self._desk.no_timer(r.rid, Wait.FORWARD)
