"""Tokens to the client: each index once, until an answer ends; the last answer ends the request."""

from __future__ import annotations

from splitserve.errors import EngineFailed
from splitserve.protocol.messages import TokenRow
from splitserve.protocol.states import FinishReason, RequestState
from splitserve.router.desk import Desk
from splitserve.router.endings import Endings
from splitserve.router.generation import Finished, Tokens
from splitserve.router.request import Request


class Delivery:
    """The answers of one request."""

    __slots__ = ("_clocked", "_desk", "_endings", "_request")

    def __init__(self, request: Request, endings: Endings, desk: Desk) -> None:
        self._request = request
        self._endings = endings
        self._desk = desk
        self._clocked = True  # the request's stages are to be told of tokens

    def take(self, choice: int, row: TokenRow) -> None:
        """Append what is new of a row, deliver it, and end with the last answer."""
        r = self._request
        if not r.live:
            return
        tokens = r.transcript.next(choice, row)
        if tokens is not None:
            self._tell(tokens)
            return
        if row.finish is FinishReason.ERROR:
            self._endings.fail(
                EngineFailed(f"a worker's engine failed under request {r.rid}; its log has the traceback")
            )
            return
        events = r.transcript.append(choice, row.first_index, row.ids, row.logprobs, row.finish)
        for event in events:
            self._tell(event)
        if events and isinstance(events[-1], Finished):
            self._answer_ended(choice, by_us=False)

    def _tell(self, event: Tokens | Finished) -> None:
        r = self._request
        if self._clocked:
            self._clocked = r.stages.tokens(self._desk.now, len(r.transcript.outputs[0]))
        r.deliver(event)

    def stop(self, choice: int) -> None:
        """A stop string was met."""
        r = self._request
        if 0 <= choice < r.transcript.n and r.transcript.stop(choice):
            r.deliver(Finished(choice, FinishReason.STOP))
            self._answer_ended(choice, by_us=True)

    def _answer_ended(self, choice: int, *, by_us: bool) -> None:
        """FinAck for what decode ended itself, and (it means "forget it") for one of several that we end; else Cancel."""
        r, leg = self._request, self._request.decode
        last = r.transcript.closed
        cancel = last and (by_us or r.state is not RequestState.DECODING)
        if leg is not None and leg.held and not cancel:
            self._desk.chores.fin_ack(leg.life, leg.slot + choice)
            if by_us:
                self._desk.chores.send_fin_acks(leg.life)
        if last:
            self._endings.finish(cancel=cancel)
