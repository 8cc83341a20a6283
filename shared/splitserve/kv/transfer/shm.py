"""Transport `shm`: read the owner's pool in place. One-sided, so the generations decide (protocol.md §2).

read generations -> copy -> read generations: equal, or Fenced. The owner need not answer, nor live: the memory stays as
long as we map it. We hold the socket that gave us the descriptor open, so that its end tells us that the owner is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitserve.errors import ChecksumMismatch, Fenced, KvMismatch, Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.checksum import block_checksum, block_view
from splitserve.kv.segment import Segment, SegmentView
from splitserve.kv.transfer.base import BlockPair, FetchResult, SourceKey, address_of, runs, source_of
from splitserve.kv.transfer.peer import peer_uid
from splitserve.kv.transfer.threads import Stop, in_thread
from splitserve.protocol.handle import KvHandle, KvSource

logger = logging.getLogger("splitserve.kv")

ANSWER_S = 0.2
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_SLICE_BYTES = 8 << 20  # a copy cannot be stopped inside a slice: about 2 ms


@dataclass(slots=True)
class _Attached:
    view: SegmentView
    connection: socket.socket
    owner_lives: bool = True
    readers: int = 0

    def close(self) -> None:
        self.connection.close()
        self.view.close()


class ShmTransport:
    """`verify`: compare each block with the owner's checksum (needs `--kv-checksum=all` at the owner too)."""

    name = "shm"

    def __init__(
        self, segment: Segment, executor: Executor, faults: Faults, *, verify: bool, answer_s: float = ANSWER_S
    ) -> None:
        self._segment = segment
        self._executor = executor
        self._faults = faults
        self._verify = verify
        self._answer_s = answer_s
        self._attached: dict[SourceKey, _Attached] = {}
        self._fence = threading.Lock()

    async def attach(self, source: KvSource) -> None:
        await self._attach(source)

    async def fetch(self, handle: KvHandle, pairs: Sequence[BlockPair]) -> FetchResult:
        attached = await self._attach(source_of(handle))
        attached.readers += 1
        began = time.perf_counter()
        try:
            await in_thread(self._executor, lambda stop: self._copy(attached.view, handle, pairs, stop))
        finally:
            attached.readers -= 1
        moved = len(pairs) * self._segment.block_bytes
        return FetchResult(moved, len(pairs), time.perf_counter() - began, self.name)

    def retain(self, live: Iterable[SourceKey]) -> None:
        named = frozenset(live)
        for key, attached in tuple(self._attached.items()):
            if not attached.owner_lives and not attached.readers and key not in named:
                del self._attached[key]
                attached.view.close()

    @property
    def attached(self) -> tuple[SourceKey, ...]:
        """Owners whose pool is mapped here, dead ones included."""
        return tuple(self._attached)

    @property
    def dead(self) -> tuple[SourceKey, ...]:
        """Those of them whose process is gone."""
        return tuple(key for key, attached in self._attached.items() if not attached.owner_lives)

    async def close(self) -> None:
        for attached in self._attached.values():
            self._hang_up(attached)
            attached.view.close()
        self._attached.clear()

    async def _attach(self, source: KvSource) -> _Attached:
        key = (source.worker, source.incarnation)
        if found := self._attached.get(key):
            return found
        path = address_of(source, self.name)
        if path is None:
            raise Unreachable(f"{source.worker} offers no shared memory")
        attached = await in_thread(self._executor, lambda _: self._open(path, source), discard=_Attached.close)
        if found := self._attached.get(key):  # another task was quicker
            attached.close()
            return found
        self._attached[key] = attached
        asyncio.get_running_loop().add_reader(attached.connection, self._owner_died, source.worker, attached)
        return attached

    def _open(self, path: str, source: KvSource) -> _Attached:
        with ExitStack() as undo:
            connection = undo.enter_context(_connect(path, self._answer_s))
            fd = _receive_descriptor(connection, path, self._answer_s)
            undo.callback(os.close, fd)
            view = SegmentView.attach(fd, self._segment.layout_digest, source.incarnation)
            undo.callback(view.close)
            self._check(view, source)
            view.prefault()
            connection.setblocking(False)
            undo.pop_all()
            os.close(fd)
        return _Attached(view, connection)

    def _check(self, view: SegmentView, source: KvSource) -> None:
        theirs, ours = view.header.block_bytes, self._segment.block_bytes
        if theirs != ours:
            raise KvMismatch(f"block bytes: a block of {source.worker} has {theirs}, one of ours {ours}")
        if self._verify and not view.header.checksummed:
            raise KvMismatch(f"checksum: --kv-checksum=all here, but not at {source.worker}; start both with it")

    def _owner_died(self, worker: str, attached: _Attached) -> None:
        logger.info("owner of shared memory is gone", extra={"worker": worker})
        self._hang_up(attached)

    def _hang_up(self, attached: _Attached) -> None:
        if attached.owner_lives:
            attached.owner_lives = False
            asyncio.get_running_loop().remove_reader(attached.connection)
            attached.connection.close()

    def _copy(self, view: SegmentView, handle: KvHandle, pairs: Sequence[BlockPair], stop: Stop) -> None:
        """In a thread; numpy lets the interpreter go while it copies."""
        _check_bounds(view, pairs)
        blocks = np.fromiter((pair.remote for pair in pairs), np.int64, len(pairs))
        promised = np.fromiter((pair.generation for pair in pairs), np.uint64, len(pairs))
        self._check_generations(view, handle, blocks, promised)
        size = self._segment.block_bytes
        theirs = np.frombuffer(view.pool, np.uint8)
        ours = np.frombuffer(self._segment.pool, np.uint8)
        slow_s = self._faults.value("kv.read_slow")
        longest = 1 if slow_s else max(1, _SLICE_BYTES // size)
        for run in runs(((pair.remote, pair.local) for pair in pairs), longest):
            stop.sleep(slow_s) if slow_s else stop.check()
            source, target, length = run.remote * size, run.local * size, run.count * size
            ours[target : target + length] = theirs[source : source + length]
        checksums = np.frombuffer(view.checksums, np.uint64)[blocks] if self._verify else None
        self._check_generations(view, handle, blocks, promised)
        if checksums is not None:
            self._check_checksums(handle, pairs, checksums, stop)

    def _check_generations(
        self, view: SegmentView, handle: KvHandle, blocks: npt.NDArray[np.int64], promised: npt.NDArray[np.uint64]
    ) -> None:
        with self._fence:  # orders these reads and the copy where the processor would not (ARM)
            found = np.frombuffer(view.generations, np.uint64)[blocks]
        moved = np.flatnonzero(found != promised)
        if len(moved):
            at = int(moved[0])
            raise Fenced(
                f"block {blocks[at]} of {handle.owner} has generation {found[at]}, handle {handle.id} names {promised[at]}"
            )

    def _check_checksums(
        self, handle: KvHandle, pairs: Sequence[BlockPair], checksums: npt.NDArray[np.uint64], stop: Stop
    ) -> None:
        for pair, expected in zip(pairs, checksums.tolist(), strict=True):
            stop.check()
            found = block_checksum(block_view(self._segment, pair.local))
            if found != expected:
                raise ChecksumMismatch(
                    f"block {pair.remote} of {handle.owner} has checksum {found:016x}, its owner took {expected:016x}"
                )


def _check_bounds(view: SegmentView, pairs: Sequence[BlockPair]) -> None:
    for pair in pairs:
        if not 0 <= pair.remote < view.header.blocks:
            raise KvMismatch(f"blocks: the handle names block {pair.remote}, the owner has {view.header.blocks}")


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
