"""NVIDIA's bindings themselves, where they are installed: they take our arguments and answer in the form that we read.

Without a driver each call is refused by CUDA, after the bindings have converted what it was given.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import pytest

from splitserve.errors import EngineFailed, Unreachable
from splitserve.kv.cuda import IPC_HANDLE_BYTES, Cuda, Event, Stream

NO_DRIVER = r"failed: cudaError(InsufficientDriver|NoDevice|InitializationError|StubLibrary)"


@pytest.fixture
def cuda() -> Cuda:
    try:
        runtime: Any = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        pytest.skip("needs the package cuda-bindings")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU: tests/gpu tries more")
    return Cuda(runtime)


def test_each_call_reaches_cuda_and_its_refusal_is_read(cuda: Cuda) -> None:
    stream, event = Stream(cuda, cuda.runtime.cudaStream_t(0)), Event(cuda, cuda.runtime.cudaEvent_t(0))
    calls = (
        lambda: cuda.allocate(4096),
        lambda: cuda.free(4096),
        lambda: cuda.call("cudaMemset", 4096, 0, 4096),
        lambda: cuda.host_buffer(4096),
        lambda: cuda.call("cudaFreeHost", 4096),
        cuda.stream,
        cuda.event,
        lambda: stream.copy(4096, 8192, 64),
        lambda: stream.mark(event),
        stream.wait,
        stream.close,
        event.wait,
        event.close,
        lambda: cuda.close(4096),
    )
    for call in calls:
        with pytest.raises(EngineFailed, match=NO_DRIVER):
            call()


def test_memory_that_cannot_be_exported_has_no_handle_and_one_that_cannot_be_opened_is_unreachable(cuda: Cuda) -> None:
    assert cuda.export(4096) is None
    with pytest.raises(Unreachable, match="cannot be mapped: cudaError"):
        cuda.open(bytes(IPC_HANDLE_BYTES))


def test_the_handles_bytes_are_read_and_written_in_place(cuda: Cuda) -> None:
    handle = cuda.runtime.cudaIpcMemHandle_t()
    data = bytes(range(IPC_HANDLE_BYTES))
    ctypes.memmove(int(handle.getPtr()), data, IPC_HANDLE_BYTES)
    assert ctypes.string_at(int(handle.getPtr()), IPC_HANDLE_BYTES) == data
