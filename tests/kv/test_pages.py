"""A pool's memory as the kernel has it: /proc/self/smaps."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator

import pytest

from splitserve.kv import pages
from splitserve.kv.cuda import Cuda
from splitserve.kv.device import DeviceMemory
from splitserve.kv.pages import private_pages, shared_pages
from splitserve.kv.segment import Segment
from support.fake_cuda import FakeRuntime

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="smaps are Linux'")
SIZE = 5 * mmap.PAGESIZE + (4 << 20)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("pages")
    os.ftruncate(made, SIZE)
    yield made
    os.close(made)


def _map_of(memory: mmap.mmap) -> dict[str, list[str]]:
    """The fields of the one map that holds all of `memory`."""
    import numpy as np

    address = np.frombuffer(memory, np.uint8).ctypes.data
    fields: dict[str, list[str]] = {}
    inside = False
    with open("/proc/self/smaps", encoding="ascii") as smaps:
        for line in smaps:
            first, *rest = line.split()
            if not first.endswith(":"):
                low, high = (int(bound, 16) for bound in first.split("-"))
                inside = low <= address and address + len(memory) <= high
            elif inside:
                fields[first] = rest
    return fields


def test_private_memory_is_zeros_all_there_from_the_start_and_of_this_process_alone() -> None:
    memory = private_pages(SIZE)
    assert not any(memory[:])
    found = _map_of(memory)
    assert int(found["Rss:"][0]) * 1024 == int(found["Private_Dirty:"][0]) * 1024 >= SIZE
    assert {"wr", "dc"} <= set(found["VmFlags:"])


def test_shared_memory_is_there_from_the_start_and_seen_through_its_file(fd: int) -> None:
    memory = shared_pages(fd, SIZE)
    assert int(_map_of(memory)["Rss:"][0]) * 1024 >= SIZE
    memory[SIZE - 1] = 7
    assert os.pread(fd, 1, SIZE - 1) == b"\7"


def test_a_kernel_that_knows_no_such_advice_is_given_every_page_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_POPULATE_WRITE", 9_999)
    memory = private_pages(SIZE)
    assert int(_map_of(memory)["Rss:"][0]) * 1024 >= SIZE


def test_memory_that_cannot_be_had_is_an_os_error() -> None:
    with pytest.raises(OSError):
        private_pages(1 << 62)


def test_a_private_segment_has_the_parts_of_a_shared_one_and_nothing_to_send() -> None:
    shared, private = (Segment.create(10, 1000, "a layout", 1, shared=way) for way in (True, False))
    assert (private.fd, private.header) == (-1, shared.header)
    assert [len(part) for part in (private.generations, private.checksums, private.pool)] == [10, 10, 10_000]
    private.pool[9_999] = 5
    private.close()
    private.close()
    shared.close()


def test_a_private_segment_gives_back_a_devices_memory_once() -> None:
    runtime = FakeRuntime()
    memory = DeviceMemory(Cuda(runtime), 10, 64)
    segment = Segment.create(10, 64, "a layout", 1, device=memory, shared=False)
    segment.close()
    assert runtime.left == (0, 0, 0)
    segment.close()
