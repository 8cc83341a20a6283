"""An owner of KV blocks and a reader's pool, in this process or in one that may be killed.

Run as a program it is such an owner: it prints one JSON line with its handle and serves until its stdin ends.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest

from splitserve.config import TransferSettings
from splitserve.faultpoints import Faults
from splitserve.kv.cuda import Cuda, load_cuda
from splitserve.kv.device import DeviceMemory
from splitserve.kv.export import Exporter
from splitserve.kv.lease import LeaseTable
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import BlockPair
from splitserve.protocol.handle import GroupBlocks, KvAddress, KvHandle
from support.fake_cuda import fake_cuda
from support.processes import ROOT, environment

BLOCKS = 32
BLOCK_BYTES = 64 << 10
LAYOUT = "test layout"
LIFE = 0xABCDEF
TOKEN = "00112233445566778899aabbccddeeff"
LEASE_S = 1000.0

needs_nixl = pytest.mark.skipif(find_spec("nixl_cu12") is None, reason="the package nixl-cu12 is not installed")


@dataclass(frozen=True)
class Owner:
    """A worker that holds `handle`; its lease table runs on a clock that stands at 0."""

    segment: Segment
    leases: LeaseTable
    exporter: Exporter
    handle: KvHandle

    def end_lease(self) -> list[Any]:
        return list(self.leases.expire(LEASE_S + 1))


@asynccontextmanager
async def owner(
    directory: Path,
    transport: Literal["auto", "shm", "tcp", "cuda_ipc", "nixl"] = "auto",
    *,
    checksum: Literal["all", "tcp", "off"] = "tcp",
    faults: str = "",
    blocks: Sequence[int] = tuple(range(BLOCKS)),
    block_bytes: int = BLOCK_BYTES,
    port: int = 0,
    cuda: Cuda | None = None,
) -> AsyncGenerator[Owner]:
    """With `cuda` (a fake one), or for cuda_ipc, the pool is a device's."""
    if cuda is None and transport == "cuda_ipc":
        cuda = fake_cuda()
    segment = Segment.create(
        BLOCKS, block_bytes, LAYOUT, LIFE, checksummed=checksum == "all", device=device_pool(cuda, block_bytes)
    )
    leases = LeaseTable()
    settings = TransferSettings(kv_transport=transport, kv_checksum=checksum, kv_port=port)
    exporter = Exporter("prefill-0", segment, leases, settings, directory, Faults(faults))
    addresses = await exporter.start()
    try:
        for block in range(BLOCKS):
            segment.generations[block] = 1000 + block
            fill(segment, (block,), content(block, block_bytes))
        groups = (GroupBlocks(0, tuple(blocks), tuple(1000 + block for block in blocks)),)
        exporter.hold(groups)
        leases.grant("handle-1", "key-1", TOKEN, groups, LEASE_S, 0.0)
        yield Owner(segment, leases, exporter, handle_of(groups, addresses))
    finally:
        await exporter.close()
        segment.close()


def handle_of(groups: tuple[GroupBlocks, ...], addresses: tuple[KvAddress, ...]) -> KvHandle:
    return KvHandle(
        id="handle-1", rid="request-1", pa=1, owner="prefill-0", incarnation=LIFE, fingerprint="f", kv_tokens=1,
        groups=groups, chain_hash="", token=TOKEN, ttl_s=LEASE_S, addresses=addresses,
    )  # fmt: skip


def content(block: int, block_bytes: int = BLOCK_BYTES) -> bytes:
    """What an owner's block holds: no two blocks, and no two places of one, are alike."""
    first = block * 1_000_003 + 1
    return array("Q", range(first, first + block_bytes // 8)).tobytes()


def local_segment(layout: str = LAYOUT, block_bytes: int = BLOCK_BYTES, cuda: Cuda | None = None) -> Segment:
    return Segment.create(BLOCKS, block_bytes, layout, 1, device=device_pool(cuda, block_bytes))


def device_pool(cuda: Cuda | None, block_bytes: int) -> DeviceMemory | None:
    """Its transfers pass three blocks at a time."""
    return cuda and DeviceMemory(cuda, BLOCKS, block_bytes, buffer_bytes=3 * block_bytes)


def local_block(segment: Segment, block: int) -> bytes:
    with closing(segment.memory.outgoing((block,))) as pieces:
        return bytes(next(pieces))


def fill(segment: Segment, blocks: Sequence[int], data: bytes) -> None:
    """The same bytes into each block."""
    for place in segment.memory.incoming(blocks, one_by_one=True):
        place[:] = data


def pairs_of(moves: Sequence[tuple[int, int]]) -> list[BlockPair]:
    """(remote, local) block numbers as pairs with the generations that `owner` gave."""
    return [BlockPair(0, remote, local, 1000 + remote) for remote, local in moves]


ALL = [(block, block) for block in range(BLOCKS)]


class OwnerProcess:
    """An owner in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], handle: KvHandle) -> None:
        self._process = process
        self.handle = handle

    def freeze(self) -> None:
        """SIGSTOP, and wait until the kernel says that it stands still."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def owner_process(directory: Path, transport: str, where: str = "") -> Generator[OwnerProcess]:
    """`where` "gpu": its pool is in a real one's memory."""
    with subprocess.Popen(
        [sys.executable, "-m", "support.kv", str(directory), transport, where],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT / "tests",
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            addresses = tuple(KvAddress(**address) for address in json.loads(line))
            groups = (GroupBlocks(0, tuple(range(BLOCKS)), tuple(1000 + block for block in range(BLOCKS))),)
            yield OwnerProcess(process, handle_of(groups, addresses))
        finally:
            process.kill()


async def _serve(directory: Path, transport: Literal["auto", "shm", "tcp", "cuda_ipc", "nixl"], where: str) -> None:
    async with owner(directory, transport, cuda=load_cuda() if where == "gpu" else None) as made:
        print(json.dumps([asdict(address) for address in made.handle.addresses]), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@contextmanager
def leaves_nothing_behind(directory: Path) -> Generator[None]:
    """Fails when open descriptors, threads of the data plane or sockets are more afterwards than before."""
    before = _left(directory)
    yield
    assert _left(directory) == before


def _left(directory: Path) -> tuple[list[str], list[str], list[str]]:
    gc.collect()  # a pool goes with its last reference
    descriptors: list[str] = []
    for entry in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        try:
            descriptors.append(entry.readlink().as_posix().partition(":[")[0])
        except FileNotFoundError:
            continue  # the one that listed the folder
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]
    return sorted(descriptors), sorted(threads), sorted(path.name for path in directory.iterdir())


def other_life(handle: KvHandle) -> KvHandle:
    return replace(handle, incarnation=LIFE + 1)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))  # type: ignore[arg-type]
