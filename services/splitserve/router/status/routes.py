"""The status page's routes: a shell that holds no data, and the data behind the API key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from splitserve.router.http_errors import ClientGone
from splitserve.router.openai.running import unless_gone
from splitserve.router.sse import EVENT_STREAM, EventStream
from splitserve.router.status.feed import StatusFeed
from splitserve.router.turn import Turn

SNAPSHOT = "/status.json"
EVENTS = "/status/events"
SHELL: Mapping[str, tuple[str, str]] = {  # path -> (file, content type)
    "/": ("index.html", "text/html; charset=utf-8"),
    "/status/status.css": ("status.css", "text/css; charset=utf-8"),
    "/status/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/status/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("main", "stream", "flow", "tables", "elements")
    },
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FILES = Path(__file__).parent / "page"
_STALL_S = 30.0

Endpoint = Callable[[Request], Awaitable[Response]]


def status_routes(feed: StatusFeed) -> dict[str, Endpoint]:
    """Every route of the page by its path; all are GET."""

    async def status_snapshot(_: Request) -> Response:
        """The router, its load, the workers and recent requests, as the status page shows them; never content."""
        return Response(feed.page(), media_type="application/json", headers=_HEADERS)

    async def status_events(http: Request) -> Response:
        if http.state.head:  # nobody reads the snapshots: no viewer
            return Response(headers={"content-type": EVENT_STREAM, "cache-control": "no-cache"})
        return _Watched(feed)

    shell = {path: _file((_FILES / name).read_bytes(), kind) for path, (name, kind) in SHELL.items()}
    return {**shell, SNAPSHOT: status_snapshot, EVENTS: status_events}


def _file(body: bytes, kind: str) -> Endpoint:
    async def status_file(_: Request) -> Response:
        return Response(body, headers={**_HEADERS, "content-type": kind})

    return status_file


class _Watched(Response):
    """Snapshots as they are made, until the client or the router leaves."""

    def __init__(self, feed: StatusFeed) -> None:
        super().__init__()
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = EventStream(scope, receive, send, (), stall_s=_STALL_S, turn=Turn())
        try:
            await unless_gone(receive, self._write(events))
        except ClientGone:
            return
        await events.end()

    async def _write(self, events: EventStream) -> None:
        async with self._feed.viewing() as pages:
            async for page in pages:
                await events.write(b"data: " + page + b"\n\n")
