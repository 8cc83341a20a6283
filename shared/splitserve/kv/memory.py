"""Where a pool's bytes lie, as transports move them: in pieces of whole blocks that the processor can address.

In host memory a piece is the pool itself. In a GPU's memory (kv/device.py) it is a buffer that the bytes pass through.
Nothing here loads torch or CUDA.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

HOST_PIECE = 1 << 20  # bytes: short enough to stop quickly, and to be summed while it is in the cache


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks [remote, remote+count) -> [local, local+count): one copy."""

    remote: int
    local: int
    count: int


class PoolMemory(Protocol):
    """The block bytes of one pool. Close the generators (`contextlib.closing`): only then is nothing under way."""

    @property
    def transfers(self) -> int | None:
        """How many may be under way at once; None: any number."""
        ...

    def outgoing(self, blocks: Sequence[int]) -> Generator[memoryview]:
        """The blocks' bytes, in their order. A piece is valid until the next is asked for."""
        ...

    def incoming(self, blocks: Sequence[int], *, one_by_one: bool = False) -> Generator[memoryview]:
        """Places for the blocks' bytes, in their order: fill each before the next is asked for.

        The pool has the bytes once the generator has ended. `one_by_one`: a block a piece.
        """
        ...

    def close(self) -> None:
        """Give the memory back. Nothing may be under way."""
        ...


class HostMemory:
    """Over `pool`, a writable view of bytes."""

    transfers: int | None = None

    def __init__(self, pool: memoryview, block_bytes: int) -> None:
        self._pool = pool
        self._block_bytes = block_bytes

    def outgoing(self, blocks: Sequence[int]) -> Generator[memoryview]:
        yield from self._pieces(blocks, max(1, HOST_PIECE // self._block_bytes))

    def incoming(self, blocks: Sequence[int], *, one_by_one: bool = False) -> Generator[memoryview]:
        yield from self._pieces(blocks, 1 if one_by_one else max(1, HOST_PIECE // self._block_bytes))

    def close(self) -> None:
        """Nothing to do: the memory goes with its last view."""

    def _pieces(self, blocks: Sequence[int], longest: int) -> Iterator[memoryview]:
        size = self._block_bytes
        for run in runs(((block, block) for block in blocks), longest):
            yield self._pool[run.local * size : (run.local + run.count) * size]


def runs(pairs: Iterable[tuple[int, int]], longest: int) -> Iterator[Run]:
    """(remote, local) pairs, in their order, as runs of neighbours on both sides, none over `longest` blocks."""
    remote = local = count = 0
    for next_remote, next_local in pairs:
        if count and (next_remote, next_local) == (remote + count, local + count) and count < longest:
            count += 1
            continue
        if count:
            yield Run(remote, local, count)
        remote, local, count = next_remote, next_local, 1
    if count:
        yield Run(remote, local, count)
