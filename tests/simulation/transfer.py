"""A fetch: a decode worker reads a prefill worker's memory block by block, in virtual time (protocol §2).

One-sided (`shm`): generations, copy, generations again; the second look decides. The owner may be frozen, or dead: who has
its memory mapped reads on. Two-sided (`tcp`): the owner's lease table knows the handle, and pins it while it sends.
Each block is copied in two halves at two instants, so a block that changes meanwhile is torn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulation.invariants import require
from simulation.memory import Memory
from splitserve.decode.effects import Fetch, Fetched, FetchFailed
from splitserve.kv.lease import Pin
from splitserve.kv.transfer.base import BlockPair
from splitserve.protocol.effects import Tick
from splitserve.protocol.states import FailReason

if TYPE_CHECKING:
    from simulation.worker import DecodeWorker, PrefillWorker

NO_BYTE_S = 3.0  # a silent owner: closed, unreachable
STALL_S = 0.1


class Transfer:
    """One fetch. Runs on the reader's time: a frozen reader copies nothing."""

    def __init__(self, reader: DecodeWorker, fetch: Fetch, owner: PrefillWorker | None, memory: Memory | None) -> None:
        self.fetch = fetch
        self._reader = reader
        self._owner = owner  # of a two-sided transport
        self._memory = memory
        self._began = reader.now
        self._targets = [reader.memory.generations[pair.local] for pair in fetch.pairs]
        self._abandoned = False
        self._severed = False
        self._pin: Pin | None = None
        self._last_byte = reader.now

    def start(self) -> None:
        self._reader.later(self._pace() / 4, self._open)

    def abandon(self) -> None:
        """Nobody wants it: it ends before its next block."""
        self._abandoned = True

    def reader_died(self) -> None:
        """Its end of a connection closes."""
        self._unpin()

    # --- steps ---

    def _open(self) -> None:
        memory, handle = self._memory, self.fetch.handle
        if memory is None:
            self._fail(FailReason.UNREACHABLE, f"no way to {handle.owner} as incarnation {handle.incarnation:x}")
        elif not self._waits(self._open):
            if self._owner is not None and not self._lock(self._owner):
                self._fail(FailReason.FENCED, f"{handle.owner} does not hold {handle.id} any more")
            elif self._owner is None and not self._unchanged(memory):
                self._fail(FailReason.FENCED, "a generation moved before the copy")
            else:
                self._copy(0, 0)

    def _copy(self, at: int, half: int) -> None:
        """Half a block, then the next; after the last one the second look."""
        memory = self._memory
        if memory is None or self._waits(self._copy, at, half):
            return
        if half == 0 and (self._abandoned or self._severed):  # a copy of one block is not interrupted
            self._fail(FailReason.UNREACHABLE, "abandoned" if self._abandoned else "the owner closed the connection")
            return
        if at == len(self.fetch.pairs):
            self._close(memory)
            return
        pair = self.fetch.pairs[at]
        middle = memory.block_tokens // 2
        start, stop = (0, middle) if half == 0 else (middle, memory.block_tokens)
        self._reader.memory.fill(pair.local, self._targets[at], start, memory.cells[pair.remote][start:stop])
        self._last_byte = self._reader.now
        self._reader.later(self._pace(), self._copy, at + half, 1 - half)

    def _close(self, memory: Memory) -> None:
        self._unpin()
        reader, pairs = self._reader, self.fetch.pairs
        if self._owner is None and not self._unchanged(memory):
            if reader.rules.validate_before_index:
                self._fail(FailReason.FENCED, "a generation moved during the copy")
                return
        elif self._owner is None or not reader.rules.validate_before_index:
            for pair in pairs:
                a_validated_read_is_what_the_handle_named(memory, reader.memory, pair)
        reader.world.journal.count("transfer", reader.world.cluster.transport)
        reader.transfer_over(self)
        size = len(pairs) * memory.block_tokens
        reader.handle(
            Fetched(self.fetch.key, size, len(pairs), reader.world.cluster.transport, reader.now - self._began)
        )

    def _fail(self, reason: FailReason, message: str) -> None:
        self._unpin()
        transport = self._reader.world.cluster.transport
        self._reader.world.journal.count("transfer failed", f"{transport}, {reason}")
        self._reader.transfer_over(self)
        self._reader.handle(FetchFailed(self.fetch.key, reason, message))

    # --- parts ---

    def _pace(self) -> float:
        least, most = self._reader.world.cluster.copy_s
        return (least + (most - least) * self._reader.world.rng.random()) / 2

    def _unchanged(self, memory: Memory) -> bool:
        generations = memory.generations
        return all(generations[pair.remote] == pair.generation for pair in self.fetch.pairs)

    def _waits(self, again: object, *args: object) -> bool:
        """Whether a two-sided owner is silent now: then `again` is tried later, or the transfer has failed."""
        owner = self._owner
        if owner is None or (owner.alive and not owner.frozen):
            return False
        if not owner.alive:
            self._fail(FailReason.UNREACHABLE, f"{owner.name} is gone")
        elif self._reader.now - self._last_byte >= NO_BYTE_S:
            self._fail(FailReason.UNREACHABLE, f"{owner.name} sent no byte for {NO_BYTE_S} s")
        else:
            self._reader.later(STALL_S, self._retry, again, args)
        return True

    @staticmethod
    def _retry(again: object, args: tuple[object, ...]) -> None:
        assert callable(again)
        again(*args)

    def _lock(self, owner: PrefillWorker) -> bool:
        leases, handle = owner.jobs.leases, self.fetch.handle
        lease = leases.lookup(handle.id, handle.token)
        if lease is None:
            return False
        held = {named for group in lease.groups for named in zip(group.blocks, group.generations, strict=True)}
        asked = {(pair.remote, pair.generation) for pair in self.fetch.pairs}
        require(asked <= held, "a_lease_holds_what_its_handle_named", f"{handle.id} lacks {asked - held}")
        self._pin = leases.pin(handle.id, self._sever)
        return True

    def _sever(self) -> None:
        self._severed = True

    def _unpin(self) -> None:
        owner, pin, self._pin = self._owner, self._pin, None
        if owner is not None and pin is not None:
            owner.soon(self._let_go, owner, pin)

    @staticmethod
    def _let_go(owner: PrefillWorker, pin: Pin) -> None:
        owner.jobs.leases.unpin(pin)
        owner.handle(Tick())


def a_validated_read_is_what_the_handle_named(source: Memory, target: Memory, pair: BlockPair) -> None:
    """Invariant 3."""
    named, have = source.sealed.get((pair.remote, pair.generation)), target.read(pair.local)
    text = f"block {pair.remote}@{pair.generation} held {named}, the reader has {have}"
    require(named == have, "a_validated_read_is_what_the_handle_named", text)
