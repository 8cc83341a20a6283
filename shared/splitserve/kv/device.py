"""A KV pool in a GPU's memory: one plain allocation, and the page-locked buffers through which its bytes leave and come.

A transfer takes a lane: a stream of its own and a ring of two buffers, so that the device copies one while the network
moves the other. Lanes are made when first needed and used again; the pool itself is never page-locked or mirrored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from splitserve.kv.cuda import Cuda, Event, HostBuffer, Stream
from splitserve.kv.memory import runs

_BUFFER_BYTES = 16 << 20
_TRANSFERS = 4  # lanes of each side


class Lane:
    """A stream with two buffers of `size` bytes; `done[i]` happens when the copy from or to buffer i is done."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self.stream: Stream = cuda.stream()
        self.buffers: tuple[HostBuffer, ...] = (cuda.host_buffer(size), cuda.host_buffer(size))
        self.done: tuple[Event, ...] = (cuda.event(), cuda.event())

    def close(self) -> None:
        for event in self.done:
            event.close()
        for buffer in self.buffers:
            self._cuda.free_host(buffer)
        self.stream.close()


class DeviceMemory:
    """`blocks` blocks, of which the last `private` are not for transports (scratch of the engine). NotEnoughMemory.

    `address` is the pool's in the device; `ipc_handle` lets other processes of this host map it (None: they cannot).
    """

    transfers: int | None = _TRANSFERS

    def __init__(
        self, cuda: Cuda, blocks: int, block_bytes: int, *, private: int = 0, buffer_bytes: int = _BUFFER_BYTES
    ) -> None:
        self.cuda = cuda
        self.size = (blocks + private) * block_bytes
        self._block_bytes = block_bytes
        self._piece = max(1, buffer_bytes // block_bytes)
        self.address = cuda.allocate(self.size)
        self.ipc_handle = cuda.export(self.address)
        self._lanes: deque[Lane] = deque()

    def outgoing(self, blocks: Sequence[int]) -> Generator[memoryview]:
        with self.lane() as lane:
            ready: tuple[Event, memoryview] | None = None
            for ring, piece in self._pieces(blocks, self._piece):
                self._copy(lane, ring, piece, out=True)
                if ready is not None:  # the piece before; this one's copy goes on while it is sent
                    ready[0].wait()
                    yield ready[1]
                ready = lane.done[ring], self._view(lane, ring, piece)
            if ready is not None:
                ready[0].wait()
                yield ready[1]

    def incoming(self, blocks: Sequence[int], *, one_by_one: bool = False) -> Generator[memoryview]:
        with self.lane() as lane:
            for ring, piece in self._pieces(blocks, 1 if one_by_one else self._piece):
                lane.done[ring].wait()  # for the piece that last lay in this buffer
                yield self._view(lane, ring, piece)
                self._copy(lane, ring, piece, out=False)

    @contextmanager
    def lane(self) -> Generator[Lane]:
        """A lane of one's own; when it is given back, nothing of it is under way. Any thread may ask."""
        try:
            lane = self._lanes.pop()
        except IndexError:
            lane = Lane(self.cuda, self._piece * self._block_bytes)
        try:
            yield lane
        finally:
            lane.stream.wait()
            self._lanes.append(lane)

    def close(self) -> None:
        while self._lanes:
            self._lanes.pop().close()
        self.cuda.free(self.address)

    def _pieces(self, blocks: Sequence[int], longest: int) -> Iterator[tuple[int, Sequence[int]]]:
        """(buffer, blocks), the two buffers in turn."""
        for number, start in zip(count(), range(0, len(blocks), longest)):
            yield number % 2, blocks[start : start + longest]

    def _copy(self, lane: Lane, ring: int, piece: Sequence[int], *, out: bool) -> None:
        """Start the copy of a piece between the pool and a buffer, and mark its end."""
        size = self._block_bytes
        for run in runs(enumerate(piece), len(piece)):  # place in the buffer -> block
            place = lane.buffers[ring].address + run.remote * size
            block = self.address + run.local * size
            target, source = (place, block) if out else (block, place)
            lane.stream.copy(target, source, run.count * size)
        lane.stream.mark(lane.done[ring])

    def _view(self, lane: Lane, ring: int, piece: Sequence[int]) -> memoryview:
        return lane.buffers[ring].view[: len(piece) * self._block_bytes]
