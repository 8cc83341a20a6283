"""Memory of a KV pool, mapped whole at its start: a page that came by need would come in the middle of a step.

In huge pages where the system gives them. Attention reads a pool in runs of a few KiB, each in another place, so that in pages
of 4 KiB some of its time is page walks (one core of an AMD EPYC, a decode step of 16 rows at a context of 1,088: 0.92 to 0.95);
and a copy out of them takes 1.3 to 1.5 times a plain memcpy, out of huge ones as long as it.

Linux gives them to private memory nearly everywhere (`madvise`, its default). To shared memory only where an administrator
set `shmem_enabled`, or, from 6.1 on, where a process asks for them at once (`MADV_COLLAPSE`): that needs a map whose address
and place in the file agree to the huge page, in the owner and in each reader. So the maps here start on a huge page.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from dataclasses import dataclass

import numpy as np

_READ, _WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
_NOT_FOR_CHILDREN = getattr(mmap, "MADV_DONTFORK", None)
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # Linux 5.14; Python's mmap has no names for these three yet
_COLLAPSE = 25  # Linux 6.1
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_HUGE_BYTES = 2 << 20  # of x86-64 and of ARM with pages of 4 KiB
_SLICE_BYTES = 16 << 20  # mapped in well under a millisecond


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """`view`: some bytes of `map`, from `start` on. Whoever holds the view, or a part of it, keeps the map."""

    map: mmap.mmap
    start: int
    view: memoryview

    def advise(self, advice: int, start: int = 0, length: int | None = None) -> bool:
        """On `length` bytes from `start` on, or all. False where this kernel does not know the advice; else OSError."""
        try:
            self.map.madvise(advice, self.start + start, self.view.nbytes - start if length is None else length)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def close(self) -> None:
        """Unmap. BufferError while somebody holds a part of the view. Safe to repeat."""
        self.view.release()
        self.map.close()


def shared_pages(fd: int, size: int) -> Pages:
    """The first `size` bytes of `fd`, writable by this process and seen by all that map it. OSError when refused."""
    return _filled(_of_file(fd, size, _WRITE))


def pages_to_read(fd: int, size: int) -> Pages:
    """The same, read only and not yet there: see `populate_for_reads`."""
    return _of_file(fd, size, _READ)


def private_pages(size: int) -> Pages:
    """Zeroed memory of this process alone. OSError when the system refuses."""
    pages = _aligned(size, _WRITE, 0)
    if _NOT_FOR_CHILDREN is not None:
        pages.advise(_NOT_FOR_CHILDREN)  # else the first write after a fork copies its page
    return _filled(pages)


def populate_for_reads(pages: Pages) -> None:
    """Map every page that another process filled. Releases the interpreter between slices. OSError when the system refuses."""
    size = pages.view.nbytes
    for start in range(0, size, _SLICE_BYTES):
        if not pages.advise(_POPULATE_READ, start, min(_SLICE_BYTES, size - start)):
            return  # an older kernel: slower first reads, nothing else


def _filled(pages: Pages) -> Pages:
    try:
        if _HUGE is not None:
            pages.advise(_HUGE)
            _collapse(pages)
        if _HUGE is None or not pages.advise(_POPULATE_WRITE):
            for start in range(0, pages.view.nbytes, mmap.PAGESIZE):
                pages.view[start] = 0
    except OSError:
        pages.close()
        raise
    return pages


def _collapse(pages: Pages) -> None:
    """Huge pages now, whatever the system's settings say (all but `deny`). One small page of each is enough to start from,
    and cheaper than all: the kernel refuses a range with none, and copies what is there."""
    for start in range(0, pages.view.nbytes - _HUGE_BYTES + 1, _HUGE_BYTES):
        if not pages.advise(_POPULATE_WRITE, start, mmap.PAGESIZE):
            return
    try:
        pages.advise(_COLLAPSE)
    except OSError as error:
        if error.errno not in (errno.ENOMEM, errno.EAGAIN, errno.EBUSY):  # no huge page is free: the rest stays small
            raise


def _of_file(fd: int, size: int, protection: int) -> Pages:
    if sys.platform != "linux":
        whole = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
        return Pages(whole, 0, memoryview(whole))
    pages = _aligned(size, protection, _MAP_NORESERVE)
    try:
        _map_over(pages, fd, protection)
    except OSError:
        pages.close()
        raise
    return pages


def _aligned(size: int, protection: int, flags: int) -> Pages:
    """Private memory from a huge page's address on; what is mapped before and behind it is never touched."""
    whole = mmap.mmap(-1, size + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, prot=protection)
    view = memoryview(whole)
    start = -_address(view) % _HUGE_BYTES
    return Pages(whole, start, view[start : start + size])


def _map_over(pages: Pages, fd: int, protection: int) -> None:
    """Put `fd` where `pages` are, which Python's mmap cannot be asked for; its map ends with theirs."""
    c_mmap = ctypes.CDLL(None, use_errno=True).mmap
    c_mmap.restype = ctypes.c_void_p
    c_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    address = _address(pages.view)
    if c_mmap(address, pages.view.nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != address:
        raise OSError(ctypes.get_errno(), "the pool's file cannot be mapped")


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data
