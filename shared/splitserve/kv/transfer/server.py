"""What all of an owner's servers need: a listener that survives everything, one task a connection."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from splitserve.errors import ConfigError, PortTaken

logger = logging.getLogger("splitserve.kv")

_BACKLOG = 128
_PAUSE_S = 0.1  # after a failed accept (no descriptors left): try again, but do not spin


class Acceptor:
    """Accepts on a non-blocking, listening socket and runs `serve` for each connection, which it closes afterwards.

    An error that `serve` raises is logged; it ends that connection only.
    """

    def __init__(self, listener: socket.socket, serve: Callable[[socket.socket], Awaitable[None]], name: str) -> None:
        self._listener = listener
        self._serve = serve
        self._name = name
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept(), name=f"kv {name} accept")

    @property
    def connections(self) -> int:
        return len(self._tasks)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                logger.error("cannot accept", extra={"server": self._name, "error": str(error)})
                await asyncio.sleep(_PAUSE_S)
                continue
            connection.setblocking(False)
            task = asyncio.create_task(self._run(connection), name=f"kv {self._name} connection")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, connection: socket.socket) -> None:
        with connection:
            try:
                await self._serve(connection)
            except Exception as error:
                logger.error("connection failed", extra={"server": self._name, "error": repr(error)}, exc_info=error)

    async def close(self) -> None:
        """No new connections, end the present ones, wait for them."""
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._listener.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def listening(host: str, port: int) -> socket.socket:
    """A non-blocking socket that listens there; port 0: a free one. PortTaken, ConfigError."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} (--kv-host): {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.setblocking(False)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise PortTaken(f"cannot listen on {host}:{port} (--kv-host, --kv-port): {error.strerror}") from error
    return listener
