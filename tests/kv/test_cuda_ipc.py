"""Transport cuda_ipc beside the contract: what the death of an owner means, and who falls back to what.

The device is a fake one (support/fake_cuda.py); the processes and sockets are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from splitserve.config import TransferSettings
from splitserve.errors import ConfigError, Fenced, Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.cuda import Cuda
from splitserve.kv.export import Exporter
from splitserve.kv.lease import LeaseTable
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import source_of
from splitserve.kv.transfer.cuda_ipc import CudaIpcTransport
from splitserve.kv.transfer.reader import KvReader
from support.fake_cuda import FakeRuntime, fake_cuda
from support.kv import ALL, BLOCKS, content, local_block, local_segment, owner, owner_process, pairs_of
from support.waiting import until


@asynccontextmanager
async def transport_of(runtime: FakeRuntime, faults: str = "") -> AsyncGenerator[tuple[CudaIpcTransport, Segment]]:
    segment = local_segment(cuda=Cuda(runtime))
    assert segment.device is not None
    with ThreadPoolExecutor(4, thread_name_prefix="kv-fetch") as executor:
        transport = CudaIpcTransport(segment, segment.device, executor, Faults(faults), verify=False)
        try:
            yield transport, segment
        finally:
            await transport.close()
            segment.close()
    assert runtime.left == (0, 0, 0)


async def test_another_processs_blocks_are_copied(tmp_path: Path) -> None:
    with owner_process(tmp_path, "cuda_ipc") as p:
        async with transport_of(FakeRuntime()) as (transport, ours):
            await transport.fetch(p.handle, pairs_of(ALL))
            assert all(local_block(ours, block) == content(block) for block in range(BLOCKS))


async def test_a_dead_owners_memory_is_let_go_of_at_once_and_unreachable(tmp_path: Path) -> None:
    runtime = FakeRuntime()
    with owner_process(tmp_path, "cuda_ipc") as p:
        async with transport_of(runtime) as (transport, _):
            await transport.attach(source_of(p.handle))
            assert runtime.left[0] == 2
            p.kill()
            await until(lambda: not transport.attached, "the owner's death is noticed")
            assert runtime.left[0] == 1
            with pytest.raises(Unreachable):
                await transport.fetch(p.handle, pairs_of([(0, 0)]))


async def test_an_owner_that_dies_under_a_copy_is_unreachable_and_its_memory_let_go_of_after_it(
    tmp_path: Path,
) -> None:
    runtime = FakeRuntime()
    with owner_process(tmp_path, "cuda_ipc") as p:
        async with transport_of(runtime, "kv.read_slow:0.02") as (transport, ours):
            fetch = asyncio.create_task(transport.fetch(p.handle, pairs_of(ALL)))
            await until(lambda: local_block(ours, 0) == content(0), "the copy has begun")
            p.kill()
            assert runtime.left[0] == 2
            with pytest.raises(Unreachable, match="died while its GPU memory was read"):
                await fetch
            assert (transport.attached, runtime.left[0]) == ((), 1)


async def test_a_block_that_gets_new_content_while_it_is_copied_is_fenced(tmp_path: Path) -> None:
    async with (
        owner(tmp_path, "cuda_ipc") as p,
        transport_of(FakeRuntime(), "kv.read_slow:0.01") as (transport, ours),
    ):
        fetch = asyncio.create_task(transport.fetch(p.handle, pairs_of(ALL)))
        await until(lambda: local_block(ours, 0) == content(0), "the copy has begun")
        p.segment.generations[0] += 1
        with pytest.raises(Fenced, match="block 0"):
            await fetch


async def test_new_content_that_comes_before_the_stream_is_through_is_fenced(tmp_path: Path) -> None:
    """The second look at the generations must wait for the copies: they are late, and all are queued at once."""
    runtime = FakeRuntime(delay_s=0.1)
    async with owner(tmp_path, "cuda_ipc") as p, transport_of(runtime) as (transport, _):
        fetch = asyncio.create_task(transport.fetch(p.handle, pairs_of([(0, 0), (2, 5), (4, 9)])))
        await until(lambda: runtime.copies == 1, "the first of three copies is done")
        p.segment.generations[4] += 1
        with pytest.raises(Fenced, match="block 4"):
            await fetch


MIXED = [
    pytest.param(True, True, {}, "cuda_ipc", id="GPU to GPU"),
    pytest.param(True, False, {}, "tcp", id="GPU to CPU"),
    pytest.param(False, True, {}, "tcp", id="CPU to GPU"),
    pytest.param(False, False, {}, "shm", id="CPU to CPU"),
    pytest.param(True, True, {"ipc": False}, "tcp", id="GPU to GPU without IPC"),
]


@pytest.mark.parametrize(("theirs", "ours", "options", "expected"), MIXED)
async def test_the_transport_follows_from_where_the_two_pools_are(
    tmp_path: Path, theirs: bool, ours: bool, options: dict[str, bool], expected: str
) -> None:
    async with owner(tmp_path, "auto", cuda=fake_cuda(**options) if theirs else None) as p:
        segment = local_segment(cuda=fake_cuda() if ours else None)
        reader = KvReader(segment, TransferSettings(), Faults())
        try:
            result = await reader.fetch(p.handle, pairs_of(ALL))
            assert result.transport == expected
            assert all(local_block(segment, block) == content(block) for block in range(BLOCKS))
        finally:
            await reader.close()
            segment.close()


@pytest.mark.parametrize(
    ("transport", "options", "gpu"), [("shm", {}, True), ("cuda_ipc", {"ipc": False}, True), ("cuda_ipc", {}, False)]
)
async def test_a_transport_that_cannot_carry_the_pool_is_refused_at_start(
    tmp_path: Path, transport: Literal["shm", "cuda_ipc"], options: dict[str, bool], gpu: bool
) -> None:
    segment = local_segment(cuda=fake_cuda(**options) if gpu else None)
    settings = TransferSettings(kv_transport=transport)
    exporter = Exporter("p", segment, LeaseTable(), settings, tmp_path, Faults())
    try:
        with pytest.raises(ConfigError, match=f"--kv-transport {transport} cannot carry KV out of"):
            await exporter.start()
    finally:
        segment.close()
