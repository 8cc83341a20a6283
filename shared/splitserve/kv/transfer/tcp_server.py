"""Transport `tcp`, the owner's end: checks who asks for what, pins, sends (protocol.md §2).

A lease that ends while its blocks are sent shuts the connection down first and frees the blocks after the thread is out.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from splitserve.errors import BadMessage, Fenced, KvError, KvMismatch, Unreachable, row_of
from splitserve.faultpoints import Faults
from splitserve.kv.checksum import block_checksum
from splitserve.kv.lease import Lease, Pin
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.server import Acceptor, listening
from splitserve.kv.transfer.threads import Stop, in_thread
from splitserve.kv.transfer.wire import HEADER, Line, Reply, Request, body_length

logger = logging.getLogger("splitserve.kv")

_SILENCE_S = 60.0  # of a reader that takes no byte; its lease mostly ends earlier, and that ends the sending


class Leases(Protocol):
    """What the server asks of the owner's lease table (kv/lease.py)."""

    def lookup(self, handle_id: str, token: str) -> Lease | None: ...
    def pin(self, handle_id: str, sever: Callable[[], None]) -> Pin: ...
    def unpin(self, pin: Pin) -> None: ...


@dataclass(slots=True)
class Counts:
    """Since the start."""

    requests: int = 0
    refused: int = 0
    severed: int = 0  # began, but did not end
    blocks: int = 0
    bytes: int = 0


class TcpServer:
    """Serves blocks of `segment` that a live lease names. `host` is an address to listen on, `port` 0 a free one."""

    def __init__(
        self, segment: Segment, leases: Leases, executor: Executor, faults: Faults, host: str, port: int
    ) -> None:
        self._segment = segment
        self._leases = leases
        self._executor = executor
        self._faults = faults
        self._host = host
        self._port = port
        self._acceptor: Acceptor | None = None
        self.counts = Counts()

    def start(self) -> int:
        """Listen; returns the port. PortTaken, ConfigError."""
        listener = listening(self._host, self._port)
        self._acceptor = Acceptor(listener, self._serve, "tcp")
        return int(listener.getsockname()[1])

    @property
    def connections(self) -> int:
        return self._acceptor.connections if self._acceptor else 0

    async def close(self) -> None:
        if self._acceptor is not None:
            await self._acceptor.close()

    async def _serve(self, connection: socket.socket) -> None:
        """Requests of one connection, one after the other, until the reader hangs up."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a reader's host may vanish
        with suppress(ConnectionError, TimeoutError, EOFError):
            while True:
                try:
                    request = await _receive_request(connection)
                except BadMessage as error:  # what follows on this connection cannot be understood either
                    await self._refuse(connection, KvMismatch(f"version: {error.message}"))
                    return
                await self._answer(connection, request)

    async def _answer(self, connection: socket.socket, request: Request) -> None:
        self.counts.requests += 1
        try:
            lease = self._check(request)
        except KvError as error:
            await self._refuse(connection, error)
            return
        blocks = [block for _, blocks in request.blocks for block in blocks]
        pin = self._leases.pin(lease.handle_id, lambda: _shut(connection))
        try:
            await in_thread(
                self._executor,
                lambda stop: self._send(connection, blocks, request.checksums, stop),
                interrupt=lambda: _shut(connection),
            )
        except Unreachable as error:
            self.counts.severed += 1
            logger.info("sending was cut off", extra={"handle": lease.handle_id, "error": error.message})
            raise ConnectionAbortedError(error.message) from error
        finally:
            self._leases.unpin(pin)
        self.counts.blocks += len(blocks)
        self.counts.bytes += len(blocks) * self._segment.block_bytes

    async def _refuse(self, connection: socket.socket, error: KvError) -> None:
        self.counts.refused += 1
        logger.info("blocks refused", extra={"code": row_of(error).code, "error": error.message})
        await asyncio.get_running_loop().sock_sendall(connection, Reply(row_of(error).code, error.message).encode())

    def _check(self, request: Request) -> Lease:
        """The lease that names all that is asked for. Fenced, KvMismatch."""
        segment = self._segment
        if request.incarnation != segment.incarnation:
            raise KvMismatch(f"incarnation: this worker lives as {segment.incarnation:x}, not {request.incarnation:x}")
        if request.layout != segment.layout_digest:
            raise KvMismatch(f"layout: the owner's KV layout is {segment.layout_digest}, the reader's {request.layout}")
        if request.block_bytes != segment.block_bytes:
            raise KvMismatch(f"block bytes: {segment.block_bytes} at the owner, {request.block_bytes} at the reader")
        lease = self._leases.lookup(request.handle_id, request.token)
        if lease is None:  # one answer for both, so that ids cannot be probed
            raise Fenced(f"handle {request.handle_id} is not held (any more), or the token is not its own")
        held = {
            (group.group, block): generation
            for group in lease.groups
            for block, generation in zip(group.blocks, group.generations, strict=True)
        }
        for group, blocks in request.blocks:
            for block in blocks:
                generation = held.get((group, block))
                if generation is None:
                    raise KvMismatch(f"blocks: block {block} of group {group} is not part of handle {lease.handle_id}")
                if segment.generations[block] != generation:
                    raise Fenced(f"block {block} has generation {segment.generations[block]}, its lease {generation}")
        return lease

    def _send(self, connection: socket.socket, blocks: Sequence[int], checksums: bool, stop: Stop) -> None:
        """In a thread: the answer, the blocks, their checksums."""
        line = Line(connection, "the reader", _SILENCE_S, stop)
        line.send(memoryview(Reply("ok").encode()))
        size = self._segment.block_bytes
        sums: list[int] = []
        with closing(self._segment.memory.outgoing(blocks)) as pieces:
            for piece in pieces:
                if checksums:
                    several = blocks[len(sums) : len(sums) + len(piece) // size]
                    sums += [self._checksum(block, piece[i * size : (i + 1) * size]) for i, block in enumerate(several)]
                line.send(piece)
        line.send(memoryview(np.array(sums, "<u8").tobytes()))

    def _checksum(self, block: int, data: memoryview) -> int:
        """The one taken when the block was finished, with `--kv-checksum=all`; else of the bytes about to be sent."""
        if self._segment.header.checksummed:
            return self._segment.checksums[block]
        taken = block_checksum(data)
        if self._faults.fires("kv.bitflip"):
            data[len(data) // 2] ^= 1
        return taken


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)


async def _receive_request(connection: socket.socket) -> Request:
    return Request.decode(await _receive(connection, body_length(await _receive(connection, HEADER.size))))


async def _receive(connection: socket.socket, length: int) -> bytes:
    """EOFError when the reader hangs up."""
    data = bytearray(length)
    at = 0
    while at < length:
        count = await asyncio.get_running_loop().sock_recv_into(connection, memoryview(data)[at:])
        if count == 0:
            raise EOFError
        at += count
    return bytes(data)
