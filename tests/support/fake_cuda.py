# ruff: noqa: N801, N802, N815  # the names are CUDA's
"""`cuda.bindings.runtime` without a GPU: the same calls over host memory, each stream a thread, so that copies are late.

Device memory is a memfd, which another process opens by the handle that names it. A copy outside of what was allocated,
a wait that is left out, or something not given back shows here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import struct
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

from splitserve.kv.cuda import IPC_HANDLE_BYTES, Cuda

_NAME = struct.Struct("<IIQ")  # pid, descriptor, size


class cudaError_t(Enum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorMapBufferObjectFailed = 205


class cudaMemcpyKind(Enum):
    cudaMemcpyDefault = 4


class cudaIpcMemHandle_t:
    def __init__(self) -> None:
        self._bytes = (ctypes.c_ubyte * IPC_HANDLE_BYTES)()

    def getPtr(self) -> int:
        return ctypes.addressof(self._bytes)


_OK = cudaError_t.cudaSuccess


class _Mapping:
    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, size)
        self._array = (ctypes.c_ubyte * size).from_buffer(self._map)
        self.address = ctypes.addressof(self._array)

    def close(self) -> None:
        del self._array
        self._map.close()
        os.close(self.fd)


class _Stream:
    def __init__(self) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="kv-fake-stream", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (item := self.work.get()) is not None:
            item()


class FakeRuntime:
    """`delay_s` before each copy; `memory` bytes of a device; `ipc` false: handles are not to be had."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaIpcMemHandle_t = cudaIpcMemHandle_t
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaEventBlockingSync = 1
    cudaHostAllocDefault = 0
    cudaIpcMemLazyEnablePeerAccess = 1

    def __init__(self, *, delay_s: float = 0.0, memory: int = 1 << 30, ipc: bool = True) -> None:
        self._delay_s = delay_s
        self._memory = memory
        self._ipc = ipc
        self._mapped: dict[int, _Mapping] = {}
        self._host: dict[int, Any] = {}
        self.held = 0  # streams and events
        self.copies = 0

    @property
    def left(self) -> tuple[int, int, int]:
        """Mappings, host buffers, streams and events that nobody gave back."""
        return len(self._mapped), len(self._host), self.held

    def cudaMalloc(self, size: int) -> tuple[cudaError_t, int]:
        if size > self._memory:
            return cudaError_t.cudaErrorMemoryAllocation, 0
        fd = os.memfd_create("fake-device")
        os.ftruncate(fd, size)
        return _OK, self._keep(_Mapping(fd, size))

    def cudaMemset(self, address: int, value: int, size: int) -> tuple[cudaError_t]:
        ctypes.memset(address, value, size)
        return (_OK,)

    def cudaFree(self, address: int) -> tuple[cudaError_t]:
        self._mapped.pop(address).close()
        return (_OK,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[cudaError_t, int]:
        buffer = (ctypes.c_ubyte * size)()
        self._host[ctypes.addressof(buffer)] = buffer
        return _OK, ctypes.addressof(buffer)

    def cudaFreeHost(self, address: int) -> tuple[cudaError_t]:
        del self._host[address]
        return (_OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[cudaError_t, _Stream]:
        self.held += 1
        return _OK, _Stream()

    def cudaStreamDestroy(self, stream: _Stream) -> tuple[cudaError_t]:
        self.held -= 1
        stream.work.put(None)
        stream.thread.join()
        return (_OK,)

    def cudaStreamSynchronize(self, stream: _Stream) -> tuple[cudaError_t]:
        done = threading.Event()
        stream.work.put(done.set)
        done.wait()
        return (_OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[cudaError_t, list[threading.Event]]:
        self.held += 1
        return _OK, []

    def cudaEventDestroy(self, event: list[threading.Event]) -> tuple[cudaError_t]:
        self.held -= 1
        return (_OK,)

    def cudaEventRecord(self, event: list[threading.Event], stream: _Stream) -> tuple[cudaError_t]:
        done = threading.Event()
        event[:] = [done]
        stream.work.put(done.set)
        return (_OK,)

    def cudaEventSynchronize(self, event: list[threading.Event]) -> tuple[cudaError_t]:
        for done in event:
            done.wait()
        return (_OK,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: cudaMemcpyKind, stream: _Stream
    ) -> tuple[cudaError_t]:
        if not (self._inside(target, size) and self._inside(source, size)):
            return (cudaError_t.cudaErrorInvalidValue,)

        def copy() -> None:
            time.sleep(self._delay_s)
            ctypes.memmove(target, source, size)
            self.copies += 1

        stream.work.put(copy)
        return (_OK,)

    def cudaIpcGetMemHandle(self, address: int) -> tuple[cudaError_t, cudaIpcMemHandle_t]:
        handle = cudaIpcMemHandle_t()
        if not self._ipc:
            return cudaError_t.cudaErrorInvalidValue, handle
        mapping = self._mapped[address]
        ctypes.memmove(handle.getPtr(), _NAME.pack(os.getpid(), mapping.fd, mapping.size), _NAME.size)
        return _OK, handle

    def cudaIpcOpenMemHandle(self, handle: cudaIpcMemHandle_t, flags: int) -> tuple[cudaError_t, int]:
        pid, fd, size = _NAME.unpack(ctypes.string_at(handle.getPtr(), _NAME.size))
        try:
            opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        except OSError:
            return cudaError_t.cudaErrorMapBufferObjectFailed, 0
        return _OK, self._keep(_Mapping(opened, size))

    def cudaIpcCloseMemHandle(self, address: int) -> tuple[cudaError_t]:
        self._mapped.pop(address).close()
        return (_OK,)

    def _keep(self, mapping: _Mapping) -> int:
        self._mapped[mapping.address] = mapping
        return mapping.address

    def _inside(self, address: int, size: int) -> bool:
        places = [(at, mapping.size) for at, mapping in tuple(self._mapped.items())]
        places += [(at, ctypes.sizeof(buffer)) for at, buffer in tuple(self._host.items())]
        return any(at <= address and address + size <= at + length for at, length in places)


def fake_cuda(**options: Any) -> Cuda:
    return Cuda(FakeRuntime(**options))
