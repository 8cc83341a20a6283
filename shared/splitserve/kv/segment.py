"""A KV pool that other processes of this host may read: nameless shared memory, passed on by file descriptor. Or one that
none may (`shared=False`): private memory of the same shape, which more systems give in huge pages (kv/pages.py).

    page 0        header: magic, version, flags, incarnation, layout, blocks, block bytes, handle of a GPU's memory
    then          generations   u64 a block, written by the owner's BlockPool before a block gets new content
    then          checksums     u64 a block, filled only with `--kv-checksum=all` (kv/checksum.py)
    then          pool          blocks x block bytes; nothing where the pool is in a GPU's memory (kv/device.py)

Each part starts on a page. The memory has no name, so nothing of it outlives its last process (protocol.md §4). A
reader's map cannot be made writable, and the file cannot shrink under it.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import sys
import tempfile
from dataclasses import dataclass
from hashlib import sha256

from splitserve.errors import KvMismatch, NotEnoughMemory
from splitserve.kv.cuda import IPC_HANDLE_BYTES
from splitserve.kv.device import DeviceMemory
from splitserve.kv.host import available_memory
from splitserve.kv.memory import HostMemory, PoolMemory
from splitserve.kv.pages import Pages, pages_to_read, populate_for_reads, private_pages, shared_pages

PAGE = mmap.PAGESIZE
_MAGIC = b"SSKVPOOL"
_VERSION = 2
_HEADER = struct.Struct(f"<8sIIQ32sQQ{IPC_HANDLE_BYTES}s")
_CHECKSUMMED, _ON_DEVICE = 1, 2  # flags
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; fcntl has no name for it yet


@dataclass(frozen=True, slots=True)
class Header:
    """Page 0. `layout` is any digest string of the KV layout; the page holds its sha256.

    `on_device`: the blocks are in a GPU's memory, which `ipc_handle` opens (zeros: nothing does).
    """

    blocks: int
    block_bytes: int
    incarnation: int
    layout: bytes
    checksummed: bool = False
    on_device: bool = False
    ipc_handle: bytes = bytes(IPC_HANDLE_BYTES)

    @property
    def generations_at(self) -> int:
        return PAGE

    @property
    def checksums_at(self) -> int:
        return self.generations_at + _pages(self.blocks * 8)

    @property
    def pool_at(self) -> int:
        return self.checksums_at + _pages(self.blocks * 8)

    @property
    def pool_bytes(self) -> int:
        """Of the pool in this file."""
        return 0 if self.on_device else self.blocks * self.block_bytes

    @property
    def size(self) -> int:
        return self.pool_at + _pages(self.pool_bytes)

    def pack(self) -> bytes:
        flags = _CHECKSUMMED * self.checksummed | _ON_DEVICE * self.on_device
        return _HEADER.pack(
            _MAGIC, _VERSION, flags, self.incarnation, self.layout, self.blocks, self.block_bytes, self.ipc_handle
        )

    @classmethod
    def read(cls, raw: bytes) -> Header:
        """KvMismatch when these are not the first bytes of a segment of this version."""
        if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
            raise KvMismatch("magic: the file descriptor is not a KV segment")
        _, version, flags, incarnation, layout, blocks, block_bytes, handle = _HEADER.unpack_from(raw)
        if version != _VERSION:
            raise KvMismatch(f"version: the segment has version {version}, this build reads {_VERSION}")
        checksummed, on_device = bool(flags & _CHECKSUMMED), bool(flags & _ON_DEVICE)
        return cls(blocks, block_bytes, incarnation, layout, checksummed, on_device, handle)


class Segment:
    """The owner's side, writable. `fd` may be sent to a reader; it stays this object's, and is -1 where memory is private.

    `generations` and `checksums` are memoryviews of u64 ("Q"), one item a block; `pool` one of bytes, block i at
    [i * block_bytes, (i+1) * block_bytes), ready for `torch.frombuffer`, and empty where the blocks are on a device.
    `memory` moves block bytes, wherever they are.
    """

    def __init__(self, fd: int, header: Header, pages: Pages, layout_digest: str, device: DeviceMemory | None) -> None:
        self.fd = fd
        self._closed = False
        self.header = header
        self.layout_digest = layout_digest
        self.device = device
        self.generations, self.checksums, self.pool = _parts(pages.view, header)
        self.memory: PoolMemory = device or HostMemory(self.pool, header.block_bytes)

    @classmethod
    def create(
        cls,
        blocks: int,
        block_bytes: int,
        layout_digest: str,
        incarnation: int,
        *,
        checksummed: bool = False,
        device: DeviceMemory | None = None,
        shared: bool = True,
    ) -> Segment:
        """A zeroed, prefaulted pool; with `device` only its tables, and the segment owns that memory.

        ValueError for an empty one; NotEnoughMemory when the system refuses.
        """
        if blocks < 1 or block_bytes < 1:
            raise ValueError(f"a segment needs blocks: got {blocks} blocks of {block_bytes} bytes")
        header = Header(
            blocks,
            block_bytes,
            incarnation,
            _digest(layout_digest),
            checksummed,
            device is not None,
            (device and device.ipc_handle) or bytes(IPC_HANDLE_BYTES),
        )
        available = available_memory()
        if header.size > available:  # asked before: populating would end in the kernel's out-of-memory killer
            raise _no_room(header.size, f"{available} are available")
        fd = -1
        try:
            if shared:
                fd = _nameless_file()
                os.ftruncate(fd, header.size)
            pages = shared_pages(fd, header.size) if shared else private_pages(header.size)
            pages.view[: _HEADER.size] = header.pack()
            if shared:
                _seal(fd)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFAULT):  # the last: populating found no page
                raise _no_room(header.size, f"the system refused them ({error.strerror})") from error
            raise
        return cls(fd, header, pages, layout_digest, device)

    @property
    def blocks(self) -> int:
        return self.header.blocks

    @property
    def block_bytes(self) -> int:
        return self.header.block_bytes

    @property
    def incarnation(self) -> int:
        return self.header.incarnation

    def close(self) -> None:
        """Close `fd`; safe to repeat. The memory goes with the last reference to `pool`: `torch.frombuffer` keeps one
        without a lock on the buffer, so unmapping by hand would pull it away under a tensor. A device's goes now."""
        if self._closed:
            return
        self._closed = True
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.memory.close()


class SegmentView:
    """A reader's side, read-only. It stays readable when the owner is dead."""

    def __init__(self, header: Header, pages: Pages) -> None:
        self.header = header
        self._pages = pages
        self.generations, self.checksums, self.pool = _parts(pages.view, header)

    @classmethod
    def attach(cls, fd: int, layout_digest: str, incarnation: int) -> SegmentView:
        """Map what `fd` names; the caller keeps `fd` and may close it. KvMismatch names the factor that differs."""
        fd = _reopened_read_only(fd)
        try:
            header = Header.read(os.pread(fd, _HEADER.size, 0))
            _check(header, os.fstat(fd).st_size, layout_digest, incarnation)
            return cls(header, pages_to_read(fd, header.size))
        finally:
            os.close(fd)

    def prefault(self) -> None:
        """Map every page now, else the first read pays a fault every 4 KB."""
        populate_for_reads(self._pages)

    def close(self) -> None:
        """Unmap, or, while somebody still looks at the memory, leave that to the last one who does. Safe to repeat."""
        try:
            for part in (self.generations, self.checksums, self.pool):
                part.release()
            self._pages.close()
        except BufferError:
            return


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _digest(layout_digest: str) -> bytes:
    return sha256(layout_digest.encode()).digest()


def _parts(whole: memoryview, header: Header) -> tuple[memoryview, memoryview, memoryview]:
    words = header.blocks * 8
    return (
        whole[header.generations_at : header.generations_at + words].cast("Q"),
        whole[header.checksums_at : header.checksums_at + words].cast("Q"),
        whole[header.pool_at : header.pool_at + header.pool_bytes],
    )


def _no_room(size: int, why: str) -> NotEnoughMemory:
    return NotEnoughMemory(f"the KV pool needs {size} bytes, {why}: give fewer with --kv-cache-memory-bytes")


def _check(header: Header, size: int, layout_digest: str, incarnation: int) -> None:
    if header.incarnation != incarnation:
        raise KvMismatch(f"incarnation: the owner lives as {header.incarnation:x}, the handle names {incarnation:x}")
    if header.layout != _digest(layout_digest):
        raise KvMismatch(f"layout: the owner's KV layout is not ours ({layout_digest}): start both with one version")
    if size < header.size:
        raise KvMismatch(f"size: the segment has {size} bytes, its header promises {header.size}")


def _nameless_file() -> int:
    if sys.platform == "linux":
        return os.memfd_create("splitserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fd, path = tempfile.mkstemp(prefix="splitserve-kv-")
    os.unlink(path)
    return fd


def _seal(fd: int) -> None:
    """No shrinking, no growing, and no new writable map: only the owner's, which exists already."""
    if sys.platform != "linux":
        return
    import fcntl

    size_seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, size_seals)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.1 only the reader's own read-only opening guards the pool
            raise


def _reopened_read_only(fd: int) -> int:
    if sys.platform == "linux":
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    return os.dup(fd)
