"""Owners whose segment is mapped here, for the transports that read it without asking: found by the owner's unix socket.

We hold the socket that gave us the descriptor open, so that its end tells us that the owner is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Executor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from splitserve.errors import KvMismatch, Unreachable
from splitserve.kv.segment import Segment, SegmentView
from splitserve.kv.transfer.base import SourceKey, address_of
from splitserve.kv.transfer.peer import peer_uid
from splitserve.kv.transfer.threads import in_thread
from splitserve.protocol.handle import KvSource

logger = logging.getLogger("splitserve.kv")

ANSWER_S = 0.2
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


@dataclass(slots=True)
class Attached:
    """`pool`: where the blocks are mapped, as `map_pool` gave it. `undo` lets go of everything."""

    view: SegmentView
    pool: int
    connection: socket.socket
    undo: ExitStack
    owner_lives: bool = True
    readers: int = 0

    def owner_gone(self) -> bool:
        """Asks the kernel now, from any thread."""
        if not self.owner_lives:
            return True
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


class Attachments:
    """Of transport `name`. `map_pool(view, undo)` makes the owner's blocks readable, in a thread.

    `outlives_owner`: whether a mapping may be used when its owner is dead; otherwise it is let go of at once.
    `verify`: the owner must take checksums (`--kv-checksum=all`).
    """

    def __init__(
        self,
        name: str,
        segment: Segment,
        executor: Executor,
        map_pool: Callable[[SegmentView, ExitStack], int],
        *,
        outlives_owner: bool,
        verify: bool,
        answer_s: float = ANSWER_S,
    ) -> None:
        self._name = name
        self._segment = segment
        self._executor = executor
        self._map_pool = map_pool
        self._outlives_owner = outlives_owner
        self._verify = verify
        self._answer_s = answer_s
        self._attached: dict[SourceKey, Attached] = {}

    @property
    def attached(self) -> tuple[SourceKey, ...]:
        """Owners whose pool is mapped here, dead ones included."""
        return tuple(self._attached)

    @property
    def dead(self) -> tuple[SourceKey, ...]:
        """Those of them whose process is gone."""
        return tuple(key for key, attached in self._attached.items() if not attached.owner_lives)

    async def attach(self, source: KvSource) -> Attached:
        """The mapping of a worker's pool, made if need be. Unreachable, KvMismatch."""
        key = (source.worker, source.incarnation)
        if found := self._attached.get(key):
            return found
        path = address_of(source, self._name)
        if path is None:
            raise Unreachable(f"{source.worker} offers no {self._name}")
        attached = await in_thread(
            self._executor, lambda _: self._open(path, source), discard=lambda late: late.undo.close()
        )
        if found := self._attached.get(key):  # another task was quicker
            attached.undo.close()
            return found
        self._attached[key] = attached
        asyncio.get_running_loop().add_reader(attached.connection, self._owner_died, key)
        return attached

    @asynccontextmanager
    async def reading(self, source: KvSource) -> AsyncGenerator[Attached]:
        """As `attach`; inside the block the mapping stays."""
        attached = await self.attach(source)
        attached.readers += 1
        try:
            yield attached
        finally:
            attached.readers -= 1
            if not self._outlives_owner:
                self.retain(())

    def retain(self, live: Iterable[SourceKey]) -> None:
        """Let go of dead owners that are neither in `live` nor being read."""
        named = frozenset(live)
        for key, attached in tuple(self._attached.items()):
            if not attached.owner_lives and not attached.readers and key not in named:
                del self._attached[key]
                attached.undo.close()

    def close(self) -> None:
        for attached in self._attached.values():
            self._hang_up(attached)
            attached.undo.close()
        self._attached.clear()

    def _open(self, path: str, source: KvSource) -> Attached:
        with ExitStack() as undo:
            connection = undo.enter_context(_connect(path, self._answer_s))
            fd = _receive_descriptor(connection, path, self._answer_s)
            try:
                view = SegmentView.attach(fd, self._segment.layout_digest, source.incarnation)
            finally:
                os.close(fd)
            undo.callback(view.close)
            self._check(view, source)
            view.prefault()
            pool = self._map_pool(view, undo)
            connection.setblocking(False)
            return Attached(view, pool, connection, undo.pop_all())

    def _check(self, view: SegmentView, source: KvSource) -> None:
        theirs, ours = view.header.block_bytes, self._segment.block_bytes
        if theirs != ours:
            raise KvMismatch(f"block bytes: a block of {source.worker} has {theirs}, one of ours {ours}")
        if self._verify and not view.header.checksummed:
            raise KvMismatch(f"checksum: --kv-checksum=all here, but not at {source.worker}; start both with it")

    def _owner_died(self, key: SourceKey) -> None:
        logger.info("owner of mapped memory is gone", extra={"worker": key[0], "transport": self._name})
        self._hang_up(self._attached[key])
        if not self._outlives_owner:
            self.retain(())

    def _hang_up(self, attached: Attached) -> None:
        if attached.owner_lives:
            attached.owner_lives = False
            asyncio.get_running_loop().remove_reader(attached.connection)
            attached.connection.close()


def _connect(path: str, answer_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(answer_s)
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise Unreachable(f"{path} takes no connection within {answer_s * 1000:.0f} ms: {error}") from error
    return connection


def _receive_descriptor(connection: socket.socket, path: str, answer_s: float) -> int:
    """The file descriptor that the owner sends at once; the caller closes it."""
    uid = peer_uid(connection)
    if uid != os.getuid():
        raise KvMismatch(f"uid: {path} belongs to uid {uid}, this worker runs as {os.getuid()}")
    try:
        _, fds, _, _ = socket.recv_fds(connection, 1, 1, _CLOSE_ON_EXEC)
    except OSError as error:
        raise Unreachable(f"{path} does not answer within {answer_s * 1000:.0f} ms: {error}") from error
    if not fds:
        raise Unreachable(f"{path} was closed without an answer: the owner is leaving, or runs as another user")
    return fds[0]
