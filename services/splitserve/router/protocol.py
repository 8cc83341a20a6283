"""uvicorn's h11 protocol with the router's manners.

h11 and not httptools: with the latter uvicorn loses the body of every POST that offers h2c, Java's default.
"""

from __future__ import annotations

import socket

import h11
import orjson
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from splitserve.errors import InvalidRequest
from splitserve.router.http_errors import error_object

# ASGI extension, of a response that has started: `write(part)` sends a part of its body at once, past all that stands
# between an endpoint and the socket (a token is such a part); `full()`: better use `send`, which waits for the reader;
# `abort()` drops the connection without waiting for anybody
CONNECTION = "splitserve.connection"
_UNREAD_MS = 60_000  # data that a client acknowledges for so long not at all, or leaves unread, costs it the connection


class Connection(h11.Connection):
    """h11's, with a short way for the parts of a chunked body: they change no state of it."""

    _chunked = False  # between a response's head that says so and the end of its body

    def send(self, event):  # pyright: ignore  # overloaded in the base class
        if type(event) is not h11.Data:
            self._chunked = False
        output = super().send(event)
        if type(event) is h11.Response:
            self._chunked = b"\r\ntransfer-encoding: chunked\r\n" in (output or b"").lower()
        return output

    def part(self, data: bytes) -> bytes:
        """The bytes of a part, not empty, of the body that is being sent."""
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(data), data)
        return self.send(h11.Data(data=data)) or b""


class RouterProtocol(H11Protocol):
    """Gives applications the extension `CONNECTION`, ignores offers to upgrade, and refuses bad HTTP in OpenAI's words."""

    def connection_made(self, transport) -> None:  # pyright: ignore[reportMissingParameterType]  # two base classes differ
        super().connection_made(transport)
        limit = self.config.h11_max_incomplete_event_size
        self.conn = conn = Connection(h11.SERVER, *([] if limit is None else [limit]))
        app, flow = self.app, self.flow

        def write(part: bytes) -> None:
            if not transport.is_closing():
                transport.write(conn.part(part))

        extension = {CONNECTION: {"write": write, "full": lambda: flow.write_paused, "abort": transport.abort}}

        async def extended(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "extensions": {**scope.get("extensions", {}), **extension}}, receive, send)

        self.app = extended
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)

    def _should_upgrade(self) -> bool:
        return False

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # half an answer is out
            self.transport.close()
            return
        body = orjson.dumps(error_object(InvalidRequest(msg)))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason="Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
