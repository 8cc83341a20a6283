"""Which prompt blocks a worker probably has cached: what this router sent there, as far as it remembers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

REMEMBERED_BLOCKS = 65_536  # a worker; 16 bytes of hash each, about 8 MiB with the dictionary


class SeenPrefixes:
    """A bounded, least-recently-used set of block hashes. An approximation: the worker's own index decides."""

    def __init__(self, limit: int = REMEMBERED_BLOCKS) -> None:
        self._limit = limit
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def overlap(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks are known."""
        count = 0
        for block in hashes:
            if block not in self._hashes:
                break
            count += 1
        return count

    def add(self, hashes: Sequence[bytes]) -> None:
        """Remember a prompt's blocks. Later blocks are useless without earlier ones, so they go first."""
        for block in reversed(hashes):
            self._hashes[block] = None
            self._hashes.move_to_end(block)
        while len(self._hashes) > self._limit:
            self._hashes.popitem(last=False)
