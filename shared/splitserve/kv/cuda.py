"""The few calls of CUDA's runtime that a KV pool on a GPU needs, over NVIDIA's own bindings (package `cuda-bindings`).

The bindings are a parameter, so that tests run all that is above them over a runtime that moves host memory. The device is
the first that the process sees (`CUDA_VISIBLE_DEVICES`).
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

from splitserve.errors import DependencyMissing, EngineFailed, NotEnoughMemory, Unreachable

IPC_HANDLE_BYTES = 64


class HostBuffer:
    """Page-locked host memory, which a device copies from and to by itself; `view` is its bytes."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.view = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


class Stream:
    """Copies in the order given, beside everything else that the device does."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda = cuda
        self._handle = handle

    def copy(self, target: int, source: int, size: int) -> None:
        """`size` bytes from an address to another; the device knows by the addresses where they lie. Returns at once."""
        runtime = self._cuda.runtime
        self._cuda.call("cudaMemcpyAsync", target, source, size, runtime.cudaMemcpyKind.cudaMemcpyDefault, self._handle)

    def mark(self, event: Event) -> None:
        """Let `event` happen when all copies so far are done."""
        self._cuda.call("cudaEventRecord", event.handle, self._handle)

    def wait(self) -> None:
        """Until all copies so far are done."""
        self._cuda.call("cudaStreamSynchronize", self._handle)

    def close(self) -> None:
        self._cuda.call("cudaStreamDestroy", self._handle)


class Event:
    """An instant of a stream. One that was never marked has happened."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda = cuda
        self.handle = handle

    def wait(self) -> None:
        self._cuda.call("cudaEventSynchronize", self.handle)

    def close(self) -> None:
        self._cuda.call("cudaEventDestroy", self.handle)


class Cuda:
    """`runtime` is the module `cuda.bindings.runtime`. Every call that fails raises EngineFailed with CUDA's own words."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory, one plain allocation, zeroed. NotEnoughMemory."""
        error, address = self.runtime.cudaMalloc(size)
        if error == self.runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise NotEnoughMemory(
                f"the KV pool needs {size} bytes of the GPU, which it does not have: "
                "give fewer with --kv-cache-memory-bytes or a smaller --gpu-memory-utilization"
            )
        self._check("cudaMalloc", error)
        self.call("cudaMemset", address, 0, size)
        return int(address)

    def free(self, address: int) -> None:
        self.call("cudaFree", address)

    def host_buffer(self, size: int) -> HostBuffer:
        (address,) = self.call("cudaHostAlloc", size, self.runtime.cudaHostAllocDefault)
        return HostBuffer(int(address), size)

    def free_host(self, buffer: HostBuffer) -> None:
        self.call("cudaFreeHost", buffer.address)

    def stream(self) -> Stream:
        (handle,) = self.call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking)
        return Stream(self, handle)

    def event(self) -> Event:
        flags = self.runtime.cudaEventDisableTiming | self.runtime.cudaEventBlockingSync
        (handle,) = self.call("cudaEventCreateWithFlags", flags)
        return Event(self, handle)

    def export(self, address: int) -> bytes | None:
        """The handle by which another process of this host opens an allocation; None where the system has no such."""
        error, handle = self.runtime.cudaIpcGetMemHandle(address)
        if error != self.runtime.cudaError_t.cudaSuccess:
            return None
        return ctypes.string_at(int(handle.getPtr()), IPC_HANDLE_BYTES)

    def open(self, exported: bytes) -> int:
        """Address of another process's allocation, mapped here. Unreachable."""
        handle = self.runtime.cudaIpcMemHandle_t()
        ctypes.memmove(int(handle.getPtr()), exported, IPC_HANDLE_BYTES)
        error, address = self.runtime.cudaIpcOpenMemHandle(handle, self.runtime.cudaIpcMemLazyEnablePeerAccess)
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise Unreachable(f"the owner's GPU memory cannot be mapped: {error.name}")
        return int(address)

    def close(self, address: int) -> None:
        """Take out what `open` mapped."""
        self.call("cudaIpcCloseMemHandle", address)

    def call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """What a function of the runtime returns beside its error code."""
        error, *values = getattr(self.runtime, name)(*arguments)
        self._check(name, error)
        return tuple(values)

    def _check(self, name: str, error: Any) -> None:
        if error != self.runtime.cudaError_t.cudaSuccess:
            raise EngineFailed(f"{name} failed: {error.name}")


def load_cuda() -> Cuda:
    """DependencyMissing without the bindings."""
    try:
        return Cuda(importlib.import_module("cuda.bindings.runtime"))
    except ImportError as error:
        raise DependencyMissing(
            f"a KV pool on a GPU needs the package cuda-bindings of torch's CUDA version ({error}): "
            "pip install 'splitserve[cuda]', or use --device cpu"
        ) from error
