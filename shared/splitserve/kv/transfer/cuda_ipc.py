"""Transport `cuda_ipc`: copy blocks out of another process's GPU memory, which CUDA maps into ours. One-sided as `shm`:
generations -> copies on a stream of their own -> wait for it -> generations.

A dead owner's memory must not be read on (NVIDIA leaves it undefined): its end is Unreachable, and the mapping is closed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack

from splitserve.errors import Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.device import DeviceMemory
from splitserve.kv.memory import runs
from splitserve.kv.segment import Segment, SegmentView
from splitserve.kv.transfer.attached import ANSWER_S, Attached, Attachments
from splitserve.kv.transfer.base import BlockPair, FetchResult, SourceKey, source_of
from splitserve.kv.transfer.fence import Fence, MappedTable
from splitserve.kv.transfer.threads import Stop, in_thread
from splitserve.protocol.handle import KvHandle, KvSource

_SLICE_BYTES = 64 << 20  # copies under way when the thread looks whether it shall stop


class CudaIpcTransport:
    """Into `memory`, the device pool of `segment`. `verify`: compare each block with the owner's checksum (needs
    `--kv-checksum=all` at the owner too)."""

    name = "cuda_ipc"

    def __init__(
        self,
        segment: Segment,
        memory: DeviceMemory,
        executor: Executor,
        faults: Faults,
        *,
        verify: bool,
        answer_s: float = ANSWER_S,
    ) -> None:
        self._segment = segment
        self._memory = memory
        self._executor = executor
        self._faults = faults
        self._verify = verify
        self._owners = Attachments(
            self.name, segment, executor, self._map, outlives_owner=False, verify=verify, answer_s=answer_s
        )

    async def attach(self, source: KvSource) -> None:
        await self._owners.attach(source)

    async def fetch(self, handle: KvHandle, pairs: Sequence[BlockPair]) -> FetchResult:
        async with self._owners.reading(source_of(handle)) as owner:
            began = time.perf_counter()
            await in_thread(self._executor, lambda stop: self._copy(owner, handle, pairs, stop))
        moved = len(pairs) * self._segment.block_bytes
        return FetchResult(moved, len(pairs), time.perf_counter() - began, self.name)

    def retain(self, live: Iterable[SourceKey]) -> None:
        self._owners.retain(live)

    @property
    def attached(self) -> tuple[SourceKey, ...]:
        """Owners whose memory is mapped here."""
        return self._owners.attached

    async def close(self) -> None:
        self._owners.close()

    def _map(self, view: SegmentView, undo: ExitStack) -> int:
        if not view.header.on_device or not any(view.header.ipc_handle):
            raise Unreachable("the owner's blocks are not in GPU memory that may be mapped")
        address = self._memory.cuda.open(view.header.ipc_handle)
        undo.callback(self._memory.cuda.close, address)
        return address

    def _copy(self, owner: Attached, handle: KvHandle, pairs: Sequence[BlockPair], stop: Stop) -> None:
        """In a thread. Leaving the lane waits for its copies, however this ends."""
        fence = Fence(MappedTable(owner.view), handle, pairs)
        fence.check()
        size = self._segment.block_bytes
        slow_s = self._faults.value("kv.read_slow")
        longest = 1 if slow_s else max(1, _SLICE_BYTES // size)
        with self._memory.lane() as lane:
            for run in runs(((pair.remote, pair.local) for pair in pairs), longest):
                stop.sleep(slow_s) if slow_s else stop.check()
                source, target = owner.pool + run.remote * size, self._memory.address + run.local * size
                lane.stream.copy(target, source, run.count * size)
        checksums = fence.checksums() if self._verify else None
        fence.check()
        if owner.owner_gone():
            raise Unreachable(f"{handle.owner} died while its GPU memory was read")
        if checksums is not None:
            fence.compare(self._segment, checksums, stop)
