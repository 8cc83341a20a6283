"""What makes a one-sided read safe: the owner's generations, looked at before the copy and after it (protocol.md §2)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from splitserve.errors import ChecksumMismatch, Fenced, KvMismatch
from splitserve.kv.checksum import checksum_of
from splitserve.kv.segment import Segment, SegmentView
from splitserve.kv.transfer.base import BlockPair
from splitserve.kv.transfer.threads import Stop
from splitserve.protocol.handle import KvHandle

Blocks = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


class Table(Protocol):
    """The two arrays beside an owner's pool, as they are now, one word a block asked for."""

    @property
    def blocks(self) -> int:
        """Of the whole pool."""
        ...

    def generations(self, blocks: Blocks) -> Words: ...

    def checksums(self, blocks: Blocks) -> Words: ...


class MappedTable:
    """Of a segment that is mapped here."""

    def __init__(self, view: SegmentView) -> None:
        self._view = view
        self._order = threading.Lock()

    @property
    def blocks(self) -> int:
        return self._view.header.blocks

    def generations(self, blocks: Blocks) -> Words:
        with self._order:  # orders these reads and the copy where the processor would not (ARM)
            return np.frombuffer(self._view.generations, np.uint64)[blocks]

    def checksums(self, blocks: Blocks) -> Words:
        return np.frombuffer(self._view.checksums, np.uint64)[blocks]


class Fence:
    """Round one copy of `pairs` out of the pool beside `table`: `check`, copy, `check`. KvMismatch for a block that the
    owner does not have."""

    def __init__(self, table: Table, handle: KvHandle, pairs: Sequence[BlockPair]) -> None:
        for pair in pairs:
            if not 0 <= pair.remote < table.blocks:
                raise KvMismatch(f"blocks: the handle names block {pair.remote}, the owner has {table.blocks}")
        self._table = table
        self._handle = handle
        self._pairs = pairs
        self._blocks = np.fromiter((pair.remote for pair in pairs), np.int64, len(pairs))
        self._promised = np.fromiter((pair.generation for pair in pairs), np.uint64, len(pairs))

    def check(self) -> None:
        """Fenced when a block has another content than the handle names."""
        found = self._table.generations(self._blocks)
        moved = np.flatnonzero(found != self._promised)
        if len(moved):
            at = int(moved[0])
            raise Fenced(
                f"block {self._blocks[at]} of {self._handle.owner} has generation {found[at]}, "
                f"handle {self._handle.id} names {self._promised[at]}"
            )

    def checksums(self) -> list[int]:
        """The owner's, of these blocks; read them before the second `check`."""
        return self._table.checksums(self._blocks).tolist()

    def compare(self, segment: Segment, expected: Sequence[int], stop: Stop) -> None:
        """What arrived in our pool with the owner's checksums. ChecksumMismatch."""
        for pair, promised in zip(self._pairs, expected, strict=True):
            stop.check()
            found = checksum_of(segment, pair.local)
            if found != promised:
                raise ChecksumMismatch(
                    f"block {pair.remote} of {self._handle.owner} has checksum {found:016x}, "
                    f"its owner took {promised:016x}"
                )
