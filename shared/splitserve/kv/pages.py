"""Memory of a KV pool, mapped whole at its start: a page that came by need would come in the middle of a step.

In huge pages where the system gives them. Attention reads a pool in runs of a few KiB, each in another place, so that in pages
of 4 KiB some of its time is page walks (one core of an AMD EPYC, a decode step of 16 rows at a context of 1,088: 0.92 to 0.95).
Linux gives them to private memory nearly everywhere (`madvise`, its default), to shared memory where
`/sys/kernel/mm/transparent_hugepage/shmem_enabled` is at least `advise`.
"""

from __future__ import annotations

import errno
import mmap

_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
_NOT_FOR_CHILDREN = getattr(mmap, "MADV_DONTFORK", None)
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # Linux 5.14; Python's mmap has no names for them yet
_SLICE_BYTES = 16 << 20  # mapped in well under a millisecond


def shared_pages(fd: int, size: int) -> mmap.mmap:
    """The whole of `fd`, writable by this process and seen by all that map it. OSError when the system refuses."""
    return _filled(mmap.mmap(fd, size, flags=mmap.MAP_SHARED))


def private_pages(size: int) -> mmap.mmap:
    """Zeroed memory of this process alone. OSError when the system refuses."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _NOT_FOR_CHILDREN is not None:
        memory.madvise(_NOT_FOR_CHILDREN)  # else the first write after a fork copies its page
    return _filled(memory)


def populate_for_reads(memory: mmap.mmap) -> None:
    """Map every page that another process filled. Releases the interpreter between slices. OSError when the system refuses."""
    for start in range(0, len(memory), _SLICE_BYTES):
        if not _advised(memory, _POPULATE_READ, start, min(_SLICE_BYTES, len(memory) - start)):
            return  # an older kernel: slower first reads, nothing else


def _filled(memory: mmap.mmap) -> mmap.mmap:
    try:
        if _HUGE is not None:
            _advised(memory, _HUGE)
        if _HUGE is None or not _advised(memory, _POPULATE_WRITE):
            for start in range(0, len(memory), mmap.PAGESIZE):
                memory[start] = 0
    except OSError:
        memory.close()
        raise
    return memory


def _advised(memory: mmap.mmap, advice: int, start: int = 0, length: int | None = None) -> bool:
    """Advise on `length` bytes from `start` on, or all. False where this kernel does not know the advice; else OSError."""
    try:
        memory.madvise(advice, start, len(memory) - start if length is None else length)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
