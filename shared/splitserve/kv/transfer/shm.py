"""Transport `shm`: read the owner's pool in place. One-sided, so the generations decide (protocol.md §2).

The owner need not answer, nor live: the memory stays as long as we map it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor

import numpy as np

from splitserve.errors import Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.memory import runs
from splitserve.kv.segment import Segment, SegmentView
from splitserve.kv.transfer.attached import ANSWER_S, Attachments
from splitserve.kv.transfer.base import BlockPair, FetchResult, SourceKey, source_of
from splitserve.kv.transfer.fence import Fence, MappedTable
from splitserve.kv.transfer.threads import Stop, in_thread
from splitserve.protocol.handle import KvHandle, KvSource

_SLICE_BYTES = 8 << 20  # a copy cannot be stopped inside a slice: about 2 ms


class ShmTransport:
    """`verify`: compare each block with the owner's checksum (needs `--kv-checksum=all` at the owner too)."""

    name = "shm"

    def __init__(
        self, segment: Segment, executor: Executor, faults: Faults, *, verify: bool, answer_s: float = ANSWER_S
    ) -> None:
        self._segment = segment
        self._executor = executor
        self._faults = faults
        self._verify = verify
        self._owners = Attachments(
            self.name, segment, executor, _in_place, outlives_owner=True, verify=verify, answer_s=answer_s
        )

    async def attach(self, source: KvSource) -> None:
        await self._owners.attach(source)

    async def fetch(self, handle: KvHandle, pairs: Sequence[BlockPair]) -> FetchResult:
        async with self._owners.reading(source_of(handle)) as owner:
            began = time.perf_counter()
            await in_thread(self._executor, lambda stop: self._copy(owner.view, handle, pairs, stop))
        moved = len(pairs) * self._segment.block_bytes
        return FetchResult(moved, len(pairs), time.perf_counter() - began, self.name)

    def retain(self, live: Iterable[SourceKey]) -> None:
        self._owners.retain(live)

    @property
    def attached(self) -> tuple[SourceKey, ...]:
        """Owners whose pool is mapped here, dead ones included."""
        return self._owners.attached

    @property
    def dead(self) -> tuple[SourceKey, ...]:
        """Those of them whose process is gone."""
        return self._owners.dead

    async def close(self) -> None:
        self._owners.close()

    def _copy(self, view: SegmentView, handle: KvHandle, pairs: Sequence[BlockPair], stop: Stop) -> None:
        """In a thread; numpy lets the interpreter go while it copies."""
        fence = Fence(MappedTable(view), handle, pairs)
        fence.check()
        size = self._segment.block_bytes
        theirs = np.frombuffer(view.pool, np.uint8)
        ours = np.frombuffer(self._segment.pool, np.uint8)
        slow_s = self._faults.value("kv.read_slow")
        longest = 1 if slow_s else max(1, _SLICE_BYTES // size)
        for run in runs(((pair.remote, pair.local) for pair in pairs), longest):
            stop.sleep(slow_s) if slow_s else stop.check()
            source, target, length = run.remote * size, run.local * size, run.count * size
            ours[target : target + length] = theirs[source : source + length]
        checksums = fence.checksums() if self._verify else None
        fence.check()
        if checksums is not None:
            fence.compare(self._segment, checksums, stop)


def _in_place(view: SegmentView, undo: object) -> int:
    """The pool is part of the view."""
    if view.header.on_device:
        raise Unreachable("the owner's blocks are in a GPU's memory")
    return 0
