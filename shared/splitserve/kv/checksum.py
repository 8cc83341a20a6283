"""Checksums of KV blocks: xxh3-64, one a block.

`tcp` (default): the sender computes them as it streams. `all`: the owner computes each held block's once, before its
handle goes out, into the array beside the pool; readers of every transport compare with that, so that a bit that flips
in a held block is found on shared memory too. Never a defence against a peer, only against accidents.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing

import xxhash

from splitserve.faultpoints import Faults
from splitserve.kv.segment import Segment


def block_checksum(block: memoryview) -> int:
    """xxh3-64 of one block's bytes."""
    return xxhash.xxh3_64_intdigest(block)


class HeldChecksums:
    """The owner's side of `--kv-checksum=all`: does nothing for a segment that is not `checksummed`."""

    def __init__(self, segment: Segment, faults: Faults) -> None:
        self._segment = segment
        self._faults = faults
        self._taken: dict[int, int] = {}  # block -> the generation its checksum is of

    def take(self, blocks: Iterable[int]) -> None:
        """Checksum blocks whose content is final. A block keeps the one of its generation: taking it again could bless
        a flipped bit. About 0.1 ms a MB."""
        segment = self._segment
        if not segment.header.checksummed:
            return
        for block in blocks:
            generation = segment.generations[block]
            if self._taken.get(block) == generation:
                continue
            segment.checksums[block] = checksum_of(segment, block)
            self._taken[block] = generation
            if self._faults.fires("kv.bitflip"):
                flip_a_bit(segment, block)


def checksum_of(segment: Segment, block: int) -> int:
    """The checksum of a block as it is in the pool now."""
    with closing(segment.memory.outgoing((block,))) as pieces:
        return block_checksum(next(pieces))


def flip_a_bit(segment: Segment, block: int) -> None:
    """Fault point kv.bitflip: one bit in the middle of a block."""
    with closing(segment.memory.outgoing((block,))) as pieces:
        data = bytearray(next(pieces))
    data[len(data) // 2] ^= 1
    for place in segment.memory.incoming((block,)):
        place[:] = data
