"""Block pool: who holds which KV block, and which content it has (protocol §2).

    FREE -> FILLING -> OWNED(refs >= 1) -> CACHED(refs = 0, indexed, immutable) -> FILLING with generation + 1
                                    `----> FREE (refs = 0, unindexed)

A block's generation rises when it is handed out, before the first write, and never on release: a released block whose
content still stands is still validly readable. One thread owns a pool; readers elsewhere see only the generations.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from splitserve.errors import EngineFailed


class BlockState(StrEnum):
    FREE = "free"
    FILLING = "filling"  # handed out, content not there yet
    OWNED = "owned"
    CACHED = "cached"  # held by nobody, found through the prefix index, evicted when blocks run short


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks by state; they sum to `total`."""

    total: int
    free: int
    filling: int
    owned: int
    cached: int


class Generations(Protocol):
    """One u64 a block: an array, or a memoryview of shared memory cast to "Q"."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class BlockPool:
    """`total` blocks. `generations` (u64[total], zeros) is shared with readers when it lies in shared memory."""

    def __init__(self, blocks: int, generations: Generations | None = None) -> None:
        self.total = blocks
        self._generations: Generations = array("Q", bytes(8 * blocks)) if generations is None else generations
        self._refs = [0] * blocks
        self._free = deque(range(blocks))  # longest free first: old content stays readable as long as it can
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._filling: set[int] = set()
        self._indexed: set[int] = set()
        self._on_evict: Callable[[int], None] = lambda block: None

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def stats(self) -> PoolStats:
        free, filling, cached = len(self._free), len(self._filling), len(self._cached)
        return PoolStats(self.total, free, filling, self.total - free - filling - cached, cached)

    def state(self, block: int) -> BlockState:
        if block in self._filling:
            return BlockState.FILLING
        if self._refs[block]:
            return BlockState.OWNED
        return BlockState.CACHED if block in self._cached else BlockState.FREE

    def refs(self, block: int) -> int:
        return self._refs[block]

    def generation(self, block: int) -> int:
        return self._generations[block]

    def generations(self, blocks: Iterable[int]) -> tuple[int, ...]:
        generations = self._generations
        return tuple(generations[block] for block in blocks)

    def writable(self, block: int) -> bool:
        """Whether its one holder may write it."""
        return self._refs[block] == 1 and block not in self._indexed

    def allocate(self, n: int) -> list[int] | None:
        """`n` blocks in ascending order, FILLING with one ref each; None when fewer are available.

        Cached ones are taken last, oldest first. Ascending, since neighbours that are in order on both sides move in one
        copy; they were given back last first.
        """
        if n > self.available:
            return None
        blocks: list[int] = []
        for _ in range(n):
            block = self._free.popleft() if self._free else self._evict()
            self._generations[block] += 1
            self._refs[block] = 1
            self._filling.add(block)
            blocks.append(block)
        blocks.sort()
        return blocks

    def fill(self, blocks: Iterable[int]) -> None:
        """Their content is there: FILLING -> OWNED. Those that are OWNED already stay so."""
        self._filling.difference_update(blocks)

    def ref(self, blocks: Iterable[int]) -> None:
        """One more holder of each; a cached block is OWNED again. EngineFailed for a free or filling one."""
        for block in blocks:
            if block in self._filling or not (self._refs[block] or block in self._cached):
                raise EngineFailed(f"block {block} is {self.state(block)}; only owned or cached blocks can be shared")
            self._cached.pop(block, None)
            self._refs[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """One holder less of each; the last one leaves it CACHED when it is indexed, else FREE.

        Give a chain's blocks last first: then leaves are evicted before what they hang from. EngineFailed when nobody
        holds a block.
        """
        for block in blocks:
            if not self._refs[block]:
                raise EngineFailed(f"block {block} is {self.state(block)} and was freed again")
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            self._filling.discard(block)
            if block in self._indexed:
                self._cached[block] = None
            else:
                self._free.append(block)

    def mark_indexed(self, block: int) -> None:
        """From now on immutable, and kept when released. EngineFailed unless it is OWNED."""
        if self.state(block) is not BlockState.OWNED:
            raise EngineFailed(f"block {block} is {self.state(block)}; only an owned block can be indexed")
        self._indexed.add(block)

    def on_evict(self, call: Callable[[int], None]) -> None:
        """`call(block)` when a cached block loses its content, before it is handed out."""
        self._on_evict = call

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._indexed.discard(block)
        self._on_evict(block)
        return block
