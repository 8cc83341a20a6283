"""Transport `tcp`, the reader's end: ask the owner for blocks, receive them straight into our pool.

Two-sided: the owner pins what it sends, so there is no generation to look at afterwards. It dies: the connection ends,
Unreachable at once. It freezes: Unreachable after `silence_s` seconds without a byte.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import closing

import numpy as np

from splitserve.errors import BadMessage, ChecksumMismatch, KvError, KvMismatch, Unreachable, error_from_code
from splitserve.faultpoints import Faults
from splitserve.kv.checksum import block_checksum
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import BlockPair, FetchResult, SourceKey, address_of, source_of
from splitserve.kv.transfer.connection import Connection, connect
from splitserve.kv.transfer.threads import Stop, in_thread
from splitserve.kv.transfer.wire import Line, Reply, Request
from splitserve.protocol.handle import KvHandle, KvSource

SILENCE_S = 3.0


class TcpTransport:
    """`verify`: ask for checksums and compare them."""

    name = "tcp"

    def __init__(
        self, segment: Segment, executor: Executor, faults: Faults, *, verify: bool, silence_s: float = SILENCE_S
    ) -> None:
        self._segment = segment
        self._executor = executor
        self._faults = faults
        self._verify = verify
        self._silence_s = silence_s
        self._idle: dict[str, list[Connection]] = {}

    async def attach(self, source: KvSource) -> None:
        """Have a connection ready."""
        connection = await self._take(self._address(source))
        self._give_back(connection)

    async def fetch(self, handle: KvHandle, pairs: Sequence[BlockPair]) -> FetchResult:
        ordered = sorted(pairs, key=lambda pair: pair.group)  # as a request lists them
        connection = await self._take(self._address(source_of(handle)))
        began = time.perf_counter()
        try:
            await in_thread(
                self._executor,
                lambda stop: self._transfer(connection, handle, ordered, stop),
                interrupt=connection.shut,
            )
        except BaseException:
            connection.socket.close()
            raise
        self._give_back(connection)
        moved = len(pairs) * self._segment.block_bytes
        return FetchResult(moved, len(pairs), time.perf_counter() - began, self.name)

    def retain(self, live: Iterable[SourceKey]) -> None:
        """Close the idle connections whose other end is gone, whoever is named: they cannot be used again."""
        for address, connections in tuple(self._idle.items()):
            alive = [connection for connection in connections if connection.alive()]
            for connection in connections:
                if connection not in alive:
                    connection.socket.close()
            self._idle[address] = alive
            if not alive:
                del self._idle[address]

    @property
    def idle_connections(self) -> int:
        return sum(len(connections) for connections in self._idle.values())

    async def close(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.socket.close()
        self._idle.clear()

    def _address(self, source: KvSource) -> str:
        address = address_of(source, self.name)
        if address is None:
            raise Unreachable(f"{source.worker} offers no tcp data plane")
        return address

    async def _take(self, address: str) -> Connection:
        """An idle connection that is still open, else a new one."""
        idle = self._idle.get(address, [])
        while idle:
            connection = idle.pop()
            if connection.alive():
                return connection
            connection.socket.close()
        return await connect(address, self._silence_s)

    def _give_back(self, connection: Connection) -> None:
        self._idle.setdefault(connection.address, []).append(connection)

    def _transfer(self, connection: Connection, handle: KvHandle, pairs: Sequence[BlockPair], stop: Stop) -> None:
        """In a thread: one request, its answer, the blocks, their checksums."""
        line = Line(connection.socket, f"{handle.owner} at {connection.address}", self._silence_s, stop)
        line.send(memoryview(self._request(handle, pairs).encode()))
        try:
            reply = Reply.decode(line.receive_frame())
        except BadMessage as error:
            raise KvMismatch(f"version: {handle.owner} at {connection.address}: {error.message}") from error
        if reply.code != "ok":
            raise _refusal(reply, handle)
        sums = self._receive_blocks(line, pairs, stop)
        if self._verify:
            self._compare(line, handle, pairs, sums)

    def _request(self, handle: KvHandle, pairs: Sequence[BlockPair]) -> Request:
        groups: dict[int, list[int]] = {}
        for pair in pairs:
            groups.setdefault(pair.group, []).append(pair.remote)
        return Request(
            handle_id=handle.id,
            token=handle.token,
            incarnation=handle.incarnation,
            layout=self._segment.layout_digest,
            block_bytes=self._segment.block_bytes,
            checksums=self._verify,
            blocks=tuple((group, tuple(blocks)) for group, blocks in groups.items()),
        )

    def _receive_blocks(self, line: Line, pairs: Sequence[BlockPair], stop: Stop) -> list[int]:
        """Into our pool; the checksums of what came, if they are wanted."""
        size = self._segment.block_bytes
        slow_s = self._faults.value("kv.read_slow")
        blocks = [pair.local for pair in pairs]
        sums: list[int] = []
        with closing(self._segment.memory.incoming(blocks, one_by_one=slow_s > 0)) as places:
            for place in places:
                if slow_s:
                    stop.sleep(slow_s)
                line.receive(place)
                if self._verify:  # now, while the bytes are in the cache
                    sums += [block_checksum(place[at : at + size]) for at in range(0, len(place), size)]
        return sums

    def _compare(self, line: Line, handle: KvHandle, pairs: Sequence[BlockPair], sums: Sequence[int]) -> None:
        promised = bytearray(8 * len(pairs))
        line.receive(memoryview(promised))
        for pair, found, expected in zip(pairs, sums, np.frombuffer(promised, "<u8").tolist(), strict=True):
            if found != expected:
                raise ChecksumMismatch(
                    f"block {pair.remote} of {handle.owner} has checksum {found:016x}, its owner took {expected:016x}"
                )


def _refusal(reply: Reply, handle: KvHandle) -> KvError:
    error = error_from_code(reply.code, f"{handle.owner}: {reply.message}")
    return error if isinstance(error, KvError) else Unreachable(f"{handle.owner} answers {reply.code}: {reply.message}")
