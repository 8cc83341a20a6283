"""Transport `shm`, the owner's end: hands the segment's file descriptor to processes of the same user.

The answer is one byte with the descriptor. The connection then stays open and silent: its end tells each side that the
other is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from splitserve.errors import ConfigError
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.peer import peer_uid
from splitserve.kv.transfer.server import Acceptor

logger = logging.getLogger("splitserve.kv")

_LONGEST_PATH = 103  # bytes; what every system's sockaddr_un holds
_BACKLOG = 64


class ShmServer:
    """`uid`: the only user who is served (ourselves)."""

    def __init__(self, segment: Segment, path: Path, *, uid: int | None = None) -> None:
        self._segment = segment
        self.path = path
        self._uid = os.getuid() if uid is None else uid
        self._acceptor: Acceptor | None = None
        self._inode = 0
        self.refused = 0

    @property
    def readers(self) -> int:
        """Processes that hold the segment mapped."""
        return self._acceptor.connections if self._acceptor else 0

    def start(self) -> None:
        """Listen. ConfigError when the path is too long for a socket. A socket left by a dead process is replaced."""
        length = len(os.fsencode(self.path))
        if length > _LONGEST_PATH:
            raise ConfigError(
                f"the socket path {self.path} has {length} bytes, {_LONGEST_PATH} are the most: shorten --kv-socket-dir"
            )
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self.path))
            self.path.chmod(0o600)  # before anyone can connect
            listener.setblocking(False)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise ConfigError(f"cannot listen on {self.path} (--kv-socket-dir): {error.strerror}") from error
        self._inode = self.path.stat().st_ino
        self._acceptor = Acceptor(listener, self._serve, "shm")

    async def close(self) -> None:
        """Hang up and remove our socket, not one that a successor put in its place."""
        if self._acceptor is None:
            return
        await self._acceptor.close()
        with suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    async def _serve(self, connection: socket.socket) -> None:
        uid = peer_uid(connection)
        if uid != self._uid:
            self.refused += 1
            logger.warning("shared memory refused to another user", extra={"uid": uid, "ours": self._uid})
            return
        socket.send_fds(connection, [b"\0"], [self._segment.fd])
        with suppress(ConnectionError):
            await asyncio.get_running_loop().sock_recv(connection, 1)
