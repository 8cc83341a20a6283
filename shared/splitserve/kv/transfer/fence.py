"""What makes a one-sided read safe: the owner's generations, looked at before the copy and after it (protocol.md §2)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from splitserve.errors import ChecksumMismatch, Fenced, KvMismatch
from splitserve.kv.checksum import checksum_of
from splitserve.kv.segment import Segment, SegmentView
from splitserve.kv.transfer.base import BlockPair
from splitserve.kv.transfer.threads import Stop
from splitserve.protocol.handle import KvHandle


class Fence:
    """Round one copy of `pairs` out of the pool that `view` describes: `check`, copy, `check`. KvMismatch for a block
    that the owner does not have."""

    def __init__(self, view: SegmentView, handle: KvHandle, pairs: Sequence[BlockPair]) -> None:
        for pair in pairs:
            if not 0 <= pair.remote < view.header.blocks:
                raise KvMismatch(f"blocks: the handle names block {pair.remote}, the owner has {view.header.blocks}")
        self._view = view
        self._handle = handle
        self._pairs = pairs
        self._blocks = np.fromiter((pair.remote for pair in pairs), np.int64, len(pairs))
        self._promised = np.fromiter((pair.generation for pair in pairs), np.uint64, len(pairs))
        self._order = threading.Lock()

    def check(self) -> None:
        """Fenced when a block has another content than the handle names."""
        with self._order:  # orders these reads and the copy where the processor would not (ARM)
            found = np.frombuffer(self._view.generations, np.uint64)[self._blocks]
        moved = np.flatnonzero(found != self._promised)
        if len(moved):
            at = int(moved[0])
            raise Fenced(
                f"block {self._blocks[at]} of {self._handle.owner} has generation {found[at]}, "
                f"handle {self._handle.id} names {self._promised[at]}"
            )

    def checksums(self) -> list[int]:
        """The owner's, of these blocks; read them before the second `check`."""
        return np.frombuffer(self._view.checksums, np.uint64)[self._blocks].tolist()

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
