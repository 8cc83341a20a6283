"""An answer as server-sent events, and what becomes of a client that does not read it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from starlette.types import Receive, Scope, Send

from splitserve.router.http_errors import ClientGone
from splitserve.router.protocol import CONNECTION

EVENT_STREAM = "text/event-stream; charset=utf-8"
_HEADERS = [
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """Headers go out with the first events, so that an early failure can have its own status."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, headers: Iterable[tuple[bytes, bytes]], *, stall_s: float
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

    async def write(self, events: bytes) -> None:
        """Raises ClientGone when the client has read nothing for `stall_s`."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        if self.write_at_once(events):
            return
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send({"type": "http.response.body", "body": events, "more_body": True})
        except TimeoutError:
            await self._drop()
            raise ClientGone from None

    def write_at_once(self, events: bytes) -> bool:
        """False: nothing was written, for it would mean to wait; `write` does."""
        if not self.started or self._put is None or self._full():
            return False
        self._put(events)
        self._state["written"] += len(events)
        return True

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drop(self) -> None:
        """The client reads nothing: drop it, where the server knows how."""
        if self._connection is not None:
            self._connection["abort"]()
            await self._receive()  # the server's word that the connection is gone
