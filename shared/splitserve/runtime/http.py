"""HTTP of a process: sockets bound before anything else starts, uvicorn without its own signal handling.

h11 and not httptools: with the latter uvicorn loses the POST body of every client that offers h2c (Java's default).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from splitserve.errors import PortTaken


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises PortTaken naming the address, also for a host that is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol's number: asyncio asks for TCP_NODELAY only of sockets that name it, and without that an answer's
    # body waits behind its head for the client's delayed acknowledgement, 40 ms
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise PortTaken(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from error
    sock.setblocking(False)
    return sock


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):  # the process's signals are `runtime.process`'s
        yield


@contextlib.asynccontextmanager
async def serving(
    app: ASGIApp,
    sock: socket.socket,
    *,
    protocol: type[H11Protocol] = H11Protocol,
    keep_alive_s: int = 75,
    grace_s: int = 5,
) -> AsyncGenerator[None, None]:
    """Serve `app` on `sock` while the block runs; open answers get `grace_s` at its end."""
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=grace_s,
        h11_max_incomplete_event_size=256 * 1024,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]), name="http")
    try:
        while not server.started:
            if task.done():
                task.result()
                raise PortTaken("the HTTP server ended before it started")
            await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        sock.close()


def health_app(page: Callable[[str], tuple[bytes, str]], ready: Callable[[], str]) -> Starlette:
    """A worker's port: `/health` (alive), `/ready` (200, or 503 with the reason that `ready()` gives), `/metrics`.

    `page` makes a metrics page and its content type of an Accept header.
    """

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readiness(_: Request) -> Response:
        why_not = ready()
        return PlainTextResponse(f"{why_not or 'ready'}\n", status_code=503 if why_not else 200)

    async def metrics(request: Request) -> Response:
        body, content_type = page(request.headers.get("accept", ""))
        return Response(body, media_type=content_type)

    return Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/ready", readiness, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ]
    )
