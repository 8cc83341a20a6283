"""A pool's memory as the kernel has it: /proc/self/smaps."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from splitserve.kv import pages
from splitserve.kv.cuda import Cuda
from splitserve.kv.device import DeviceMemory
from splitserve.kv.pages import Pages, pages_to_read, populate_for_reads, private_pages, shared_pages
from splitserve.kv.segment import Segment
from support.fake_cuda import FakeRuntime

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="smaps are Linux'")
PR_SET_THP_DISABLE = 41
SIZE = 5 * mmap.PAGESIZE + (4 << 20)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("pages")
    os.ftruncate(made, SIZE)
    yield made
    os.close(made)


@pytest.fixture
def huge_pages_allowed() -> Iterator[None]:
    """The suite runs without (tests/conftest.py)."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)
    yield
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def _map_of(pages: Pages) -> dict[str, list[str]]:
    """The fields of the one map that holds all of `pages`."""
    address, size = np.frombuffer(pages.view, np.uint8).ctypes.data, pages.view.nbytes
    fields: dict[str, list[str]] = {}
    inside = False
    with open("/proc/self/smaps", encoding="ascii") as smaps:
        for line in smaps:
            first, *rest = line.split()
            if not first.endswith(":"):
                low, high = (int(bound, 16) for bound in first.split("-"))
                inside = low <= address and address + size <= high
            elif inside:
                fields[first] = rest
    return fields


def _kilobytes(pages: Pages, field: str) -> int:
    return int(_map_of(pages)[field][0])


def _collapses() -> bool:
    """Whether this kernel gives shared memory in huge pages to who asks: from 6.1 on, if it is not forbidden."""
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    allowed = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return release >= (6, 1) and allowed.exists() and "[deny]" not in allowed.read_text()


def test_private_memory_is_zeros_all_there_from_the_start_and_of_this_process_alone() -> None:
    memory = private_pages(SIZE)
    assert not any(memory.view)
    assert _kilobytes(memory, "Rss:") * 1024 == _kilobytes(memory, "Private_Dirty:") * 1024 >= SIZE
    assert {"wr", "dc"} <= set(_map_of(memory)["VmFlags:"])


def test_shared_memory_is_there_from_the_start_and_seen_through_its_file(fd: int) -> None:
    memory = shared_pages(fd, SIZE)
    assert _kilobytes(memory, "Rss:") * 1024 >= SIZE
    assert not any(memory.view)
    memory.view[SIZE - 1] = 7
    assert os.pread(fd, 1, SIZE - 1) == b"\7"


def test_a_reader_sees_every_byte_in_its_place_and_can_write_none(fd: int) -> None:
    owner, reader = shared_pages(fd, SIZE), pages_to_read(fd, SIZE)
    np.frombuffer(owner.view, np.uint8)[:] = np.arange(SIZE, dtype=np.uint32) % 251
    populate_for_reads(reader)
    assert _kilobytes(reader, "Rss:") * 1024 >= SIZE
    assert bytes(reader.view) == bytes(owner.view)
    assert reader.view.readonly
    assert "wr" not in _map_of(reader)["VmFlags:"]


@pytest.mark.usefixtures("huge_pages_allowed")
@pytest.mark.skipif(not _collapses(), reason="Linux before 6.1, or huge pages of shared memory are forbidden here")
def test_shared_memory_is_in_huge_pages_for_its_owner_and_its_reader_whatever_the_default_is(fd: int) -> None:
    owner, reader = shared_pages(fd, SIZE), pages_to_read(fd, SIZE)
    populate_for_reads(reader)
    assert [_kilobytes(side, "ShmemPmdMapped:") for side in (owner, reader)] == [4096, 4096]


def test_closing_unmaps_all_of_it_and_the_file_is_not_held(fd: int) -> None:
    inode = str(os.fstat(fd).st_ino)

    def held() -> int:
        return sum(inode in line.split() for line in Path("/proc/self/maps").read_text().splitlines())

    owner, reader = shared_pages(fd, SIZE), pages_to_read(fd, SIZE)
    assert held() == 2
    for side in (owner, reader, owner):
        side.close()
    assert held() == 0


@pytest.mark.parametrize("advice", ["_POPULATE_WRITE", "_COLLAPSE"])
def test_a_kernel_that_knows_no_such_advice_gives_every_page_all_the_same(
    monkeypatch: pytest.MonkeyPatch, fd: int, advice: str
) -> None:
    monkeypatch.setattr(pages, advice, 9_999)
    for memory in (private_pages(SIZE), shared_pages(fd, SIZE)):
        assert _kilobytes(memory, "Rss:") * 1024 >= SIZE


def test_a_system_without_a_free_huge_page_gives_small_ones(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    advise = Pages.advise

    def none_free(self: Pages, advice: int, start: int = 0, length: int | None = None) -> bool:
        if advice == pages._COLLAPSE:  # pyright: ignore[reportPrivateUsage]
            raise OSError(errno.ENOMEM, "no huge page")
        return advise(self, advice, start, length)

    monkeypatch.setattr(Pages, "advise", none_free)
    assert _kilobytes(shared_pages(fd, SIZE), "Rss:") * 1024 >= SIZE


def test_memory_that_cannot_be_had_is_an_os_error() -> None:
    with pytest.raises(OSError):
        private_pages(1 << 62)


def test_a_file_that_cannot_be_mapped_is_an_os_error() -> None:
    read_only = os.open("/proc/self/exe", os.O_RDONLY)
    try:
        with pytest.raises(OSError):
            shared_pages(read_only, SIZE)
    finally:
        os.close(read_only)


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
