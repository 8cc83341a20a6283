"""An answer as server-sent events, and what becomes of a client that does not read it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from starlette.types import Receive, Scope, Send

from splitserve.router.http_errors import ClientGone
from splitserve.router.protocol import CONNECTION
from splitserve.router.turn import Turn

EVENT_STREAM = "text/event-stream; charset=utf-8"
_HEADERS = [
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """Headers go out with the first events, so that an early failure can have its own status."""

    __slots__ = (
        "_connection",
        "_full",
        "_headers",
        "_put",
        "_receive",
        "_send",
        "_stall_s",
        "_state",
        "_turn",
        "_unsent",
        "started",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Iterable[tuple[bytes, bytes]],
        *,
        stall_s: float,
        turn: Turn,
    ) -> None:
        self.started = False
        self._receive = receive
        self._send = send
        self._headers = [*_HEADERS, *headers]
        self._stall_s = stall_s
        self._connection = connection = scope.get("extensions", {}).get(CONNECTION)
        self._put: Callable[[bytes], None] | None = connection["write"] if connection else None
        self._full: Callable[[], bool] = connection["full"] if connection else bool
        self._state = scope["state"]
        self._turn = turn
        self._unsent: list[bytes] = []  # not empty means that `_flush` is due

    async def write(self, events: bytes) -> None:
        """Raises ClientGone when the client has read nothing for `stall_s`."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        self._flush()
        if self._put is not None and not self._full():
            self._unsent.append(events)
            self._flush()
            return
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send({"type": "http.response.body", "body": events, "more_body": True})
        except TimeoutError:
            await self._drop()
            raise ClientGone from None

    def write_soon(self, events: bytes) -> bool:
        """Write in the loop's next turn. False: nothing will be, for it would mean to wait; `write` does."""
        if not self.started or self._put is None or self._full():
            return False
        if not self._unsent:
            self._turn.soon(self._flush)
        self._unsent.append(events)
        return True

    async def end(self) -> None:
        self._flush()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _flush(self) -> None:
        unsent, put = self._unsent, self._put
        if unsent and put is not None:
            events = unsent[0] if len(unsent) == 1 else b"".join(unsent)
            unsent.clear()
            put(events)
            self._state["written"] += len(events)

    async def _drop(self) -> None:
        """The client reads nothing: drop it, where the server knows how."""
        if self._connection is not None:
            self._connection["abort"]()
            await self._receive()  # the server's word that the connection is gone
