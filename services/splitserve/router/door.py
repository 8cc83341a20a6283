"""The outermost layer of the HTTP side: request ids, HEAD, API keys, unforeseen errors, and a word to the observer."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitserve.errors import SplitserveError
from splitserve.protocol.trace import NO_TRACE, TRACEPARENT, TRACESTATE, TraceContext, trace_of
from splitserve.router.auth import ApiKeys
from splitserve.router.http_errors import error_response
from splitserve.router.observe import HttpAnswer
from splitserve.router.observers import Observers
from splitserve.router.refusals import GENERATION_PATHS

log = logging.getLogger("splitserve.router")

_LONGEST_ID = 200


class Door:
    """ASGI middleware. It sets `arrived` (time.monotonic()), `client_request_id`, `trace` and `head` (it came as HEAD) in the
    request's state; to `written` whoever writes past `send` adds the bytes."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, observer: Observers) -> None:
        self._app = app
        self._keys = keys
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _as_origin(scope)
        headers = Headers(scope=scope)
        visit = _Visit(scope, send, _request_id(headers))
        inner = visit.inner_scope()
        try:
            self._keys.check(scope["path"], headers)
            await self._app(inner, visit.receiving(receive), visit.send)
        except SplitserveError as error:  # a wrong key; endpoints' errors are answered further in
            if scope["path"] in GENERATION_PATHS:
                self._observer.refused(error)
            await error_response(error)(inner, receive, visit.send)
        except Exception:
            trace: TraceContext = inner["state"]["trace"]
            told = {"path": scope["path"], "request_id": visit.shown_id, **trace.told()}
            log.exception("request failed unforeseen", extra=told)
            if visit.status:
                raise  # half an answer is out: the server closes the connection
            await error_response(SplitserveError("an error of the server's own; its log has the traceback"))(
                inner, receive, visit.send
            )
        finally:
            route = getattr(inner.get("route"), "path", "")
            self._observer.answered(
                HttpAnswer(
                    scope["method"],
                    route,
                    visit.status,
                    time.monotonic() - visit.arrived,
                    received=visit.received,
                    sent=visit.sent + inner["state"]["written"],
                )
            )


def _as_origin(scope: Scope) -> Scope:
    """The path alone: keys, routes and metrics see one, whatever form it came in. Off it are scheme and host of an absolute
    target, which a server has to take (RFC 9112 §3.2.2), and `--root-path`, for proxies that leave it on."""
    prefix, path = scope.get("root_path", ""), scope["path"]
    scheme, absolute, rest = path.partition("://")
    if absolute and "/" not in scheme:
        path = f"/{rest.partition('/')[2]}"
    if prefix and path.startswith(f"{prefix}/"):
        path = path.removeprefix(prefix)
    return scope if path == scope["path"] else {**scope, "path": path}


class _Visit:
    """One request through the door."""

    def __init__(self, scope: Scope, send: Send, client_id: str) -> None:
        self._scope = scope
        self._send = send
        self._client_id = client_id
        self.shown_id = client_id or uuid.uuid4().hex
        self.arrived = time.monotonic()
        self.status = 0
        self.received = 0  # bytes of bodies
        self.sent = 0

    def inner_scope(self) -> Scope:
        """HEAD is GET whose body is dropped on its way out, wherever GET is."""
        state: dict[str, Any] = {
            **self._scope.get("state", {}),
            "arrived": self.arrived,
            "client_request_id": self._client_id,
            "trace": trace_in(Headers(scope=self._scope)),
            "written": 0,
            "head": self._scope["method"] == "HEAD",
        }
        method = "GET" if state["head"] else self._scope["method"]
        return {**self._scope, "method": method, "state": state}

    def receiving(self, receive: Receive) -> Receive:
        """`receive`, counted."""

        async def counted() -> Message:
            message = await receive()
            self.received += len(message.get("body", b""))
            return message

        return counted

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.setdefault("x-request-id", self.shown_id)
        elif self._scope["method"] == "HEAD" and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        self.sent += len(message.get("body", b""))
        await self._send(message)


def _request_id(headers: Headers) -> str:
    """The client's own id, if it can stand in a header of ours; it is an attribute, never a key."""
    given = headers.get("x-request-id", "")
    return given if 0 < len(given) <= _LONGEST_ID and given.isascii() and given.isprintable() else ""


def trace_in(headers: Headers) -> TraceContext:
    """The caller's trace. Two `traceparent` are none, several `tracestate` are one (W3C Trace Context)."""
    if len(headers.getlist(TRACEPARENT)) != 1:
        return NO_TRACE
    return trace_of({TRACEPARENT: headers[TRACEPARENT], TRACESTATE: ",".join(headers.getlist(TRACESTATE))})
