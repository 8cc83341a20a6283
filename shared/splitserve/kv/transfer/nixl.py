"""Transport `nixl`: read the owner's memory by NVIDIA's nixl over UCX: RDMA, or what else UCX finds. One-sided as `shm`:
generations -> blocks -> generations, each a read of its own that ends before the next begins, since nixl orders none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from uuid import uuid4

import numpy as np

from splitserve.errors import BadMessage, KvMismatch, Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.memory import Run, runs
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import BlockPair, FetchResult, SourceKey, address_of, source_of
from splitserve.kv.transfer.connection import Connection, connect
from splitserve.kv.transfer.fence import Blocks, Fence, Words
from splitserve.kv.transfer.nixl_agent import Agent, Stalled, address_of_buffer, load_nixl, places
from splitserve.kv.transfer.nixl_card import Card
from splitserve.kv.transfer.threads import Stop, in_thread
from splitserve.kv.transfer.wire import Line
from splitserve.protocol.handle import KvHandle, KvSource

_READ_BYTES = 16 << 20  # of one nixl read, which is not stopped in the middle


@dataclass(slots=True, eq=False)
class _Owner:
    """`words`: registered memory for a look at the owner's tables. One fetch at a time: they share the wire anyway."""

    connection: Connection
    card: Card
    agent: Agent
    peer: str
    words: Words
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def close(self) -> None:
        self.agent.close()
        self.connection.socket.close()


@dataclass(frozen=True, slots=True)
class _RemoteTable:
    """The owner's tables, read anew at each look."""

    owner: _Owner
    silence_s: float
    stop: Stop

    @property
    def blocks(self) -> int:
        return self.owner.card.blocks

    def generations(self, blocks: Blocks) -> Words:
        return self._read(self.owner.card.generations, blocks)

    def checksums(self, blocks: Blocks) -> Words:
        return self._read(self.owner.card.checksums, blocks)

    def _read(self, table: int, blocks: Blocks) -> Words:
        """One read, of all words between the first block and the last."""
        owner = self.owner
        first, size = int(blocks.min()), 8 * int(np.ptp(blocks) + 1)
        ours = owner.words.ctypes.data
        owner.agent.read(
            owner.peer, places([(table + 8 * first, size)]), places([(ours, size)]), self.silence_s, self.stop
        )
        return owner.words[blocks - first]


class NixlTransport:
    """`verify`: compare each block with the owner's checksum (needs `--kv-checksum=all` at the owner too).

    ConfigError where nixl is not installed.
    """

    name = "nixl"

    def __init__(self, segment: Segment, executor: Executor, faults: Faults, *, verify: bool, silence_s: float) -> None:
        self._nixl = load_nixl()
        self._segment = segment
        self._executor = executor
        self._faults = faults
        self._verify = verify
        self._silence_s = silence_s
        self._owners: dict[SourceKey, _Owner] = {}

    async def attach(self, source: KvSource) -> None:
        await self._attach(source)

    async def fetch(self, handle: KvHandle, pairs: Sequence[BlockPair]) -> FetchResult:
        source = source_of(handle)
        owner = await self._attach(source)
        async with owner.turn:
            began = time.perf_counter()
            try:
                await in_thread(self._executor, lambda stop: self._copy(owner, handle, pairs, stop))
            finally:
                if not owner.agent.open:
                    self._forget((source.worker, source.incarnation), owner)
        moved = len(pairs) * self._segment.block_bytes
        return FetchResult(moved, len(pairs), time.perf_counter() - began, self.name)

    def retain(self, live: Iterable[SourceKey]) -> None:
        """Let go of owners that are gone, whoever is named: their memory went with them."""
        for key, owner in tuple(self._owners.items()):
            if not owner.turn.locked() and not owner.connection.alive():
                self._forget(key, owner)

    @property
    def attached(self) -> tuple[SourceKey, ...]:
        return tuple(self._owners)

    async def close(self) -> None:
        for key, owner in tuple(self._owners.items()):
            self._forget(key, owner)

    async def _attach(self, source: KvSource) -> _Owner:
        self.retain(())
        key = (source.worker, source.incarnation)
        if found := self._owners.get(key):
            return found
        address = address_of(source, self.name)
        if address is None:
            raise Unreachable(f"{source.worker} offers no nixl")
        connection = await connect(address, self._silence_s)
        try:
            owner = await in_thread(
                self._executor,
                lambda stop: self._open(connection, source, stop),
                interrupt=connection.shut,
                discard=lambda late: late.agent.close(),
            )
        except BaseException:
            connection.socket.close()
            raise
        if found := self._owners.get(key):  # another task was quicker
            owner.close()
            return found
        self._owners[key] = owner
        return owner

    def _forget(self, key: SourceKey, owner: _Owner) -> None:
        owner.close()
        if self._owners.get(key) is owner:
            del self._owners[key]

    def _open(self, connection: Connection, source: KvSource, stop: Stop) -> _Owner:
        """In a thread: get the owner's card and make an agent for it."""
        line = Line(connection.socket, f"{source.worker} at {connection.address}", self._silence_s, stop)
        try:
            card = Card.decode(line.receive_frame())
        except BadMessage as error:
            raise KvMismatch(f"version: {source.worker} at {connection.address}: {error.message}") from error
        self._check(card, source)
        agent = Agent(self._nixl, f"reader-{uuid4().hex}", serves=False)
        words = np.zeros(card.blocks, np.uint64)
        agent.register(words.ctypes.data, words.nbytes)
        agent.register(address_of_buffer(self._segment.pool), len(self._segment.pool))
        return _Owner(connection, card, agent, agent.connect(card.metadata), words)

    def _check(self, card: Card, source: KvSource) -> None:
        ours = self._segment
        if card.incarnation != source.incarnation:
            raise KvMismatch(f"incarnation: the owner lives as {card.incarnation:x}, not {source.incarnation:x}")
        if card.layout != ours.layout_digest:
            raise KvMismatch(f"layout: the owner's KV layout is {card.layout}, ours {ours.layout_digest}")
        if card.block_bytes != ours.block_bytes:
            raise KvMismatch(f"block bytes: {card.block_bytes} at the owner, {ours.block_bytes} here")
        if self._verify and not card.checksummed:
            raise KvMismatch(f"checksum: --kv-checksum=all here, but not at {source.worker}; start both with it")

    def _copy(self, owner: _Owner, handle: KvHandle, pairs: Sequence[BlockPair], stop: Stop) -> None:
        """In a thread. An agent whose read did not end is ended here, before anybody may reuse our blocks."""
        try:
            fence = Fence(_RemoteTable(owner, self._silence_s, stop), handle, pairs)
            fence.check()
            self._read_blocks(owner, pairs, stop)
            checksums = fence.checksums() if self._verify else None
            fence.check()
        except Stalled:
            owner.agent.close()
            stop.check()
            raise
        if not owner.connection.alive():
            raise Unreachable(f"{handle.owner} died while it was read by nixl")
        if checksums is not None:
            fence.compare(self._segment, checksums, stop)

    def _read_blocks(self, owner: _Owner, pairs: Sequence[BlockPair], stop: Stop) -> None:
        size, pool, ours = self._segment.block_bytes, owner.card.pool, address_of_buffer(self._segment.pool)
        slow_s = self._faults.value("kv.read_slow")
        longest = 1 if slow_s else max(1, _READ_BYTES // size)
        for several in _batches(runs(((pair.remote, pair.local) for pair in pairs), longest), longest):
            stop.sleep(slow_s) if slow_s else stop.check()
            source = places([(pool + run.remote * size, run.count * size) for run in several])
            target = places([(ours + run.local * size, run.count * size) for run in several])
            owner.agent.read(owner.peer, source, target, self._silence_s, stop)


def _batches(several: Iterable[Run], longest: int) -> Iterator[list[Run]]:
    """Runs together, of at most `longest` blocks each time."""
    batch: list[Run] = []
    count = 0
    for run in several:
        if batch and count + run.count > longest:
            yield batch
            batch, count = [], 0
        batch.append(run)
        count += run.count
    if batch:
        yield batch
