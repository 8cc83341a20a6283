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

ABORT = "splitserve.abort"  # ASGI extension: drops the connection without waiting for its reader
_UNREAD_MS = 60_000  # data that a client acknowledges for so long not at all, or leaves unread, costs it the connection


class RouterProtocol(H11Protocol):
    """Gives applications the extension `ABORT`, ignores offers to upgrade, and refuses bad HTTP in OpenAI's words."""

    def connection_made(self, transport) -> None:  # pyright: ignore[reportMissingParameterType]  # two base classes differ
        super().connection_made(transport)
        app, extension = self.app, {ABORT: {"now": transport.abort}}

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "extensions": {**scope.get("extensions", {}), **extension}}, receive, send)

        self.app = with_abort
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
