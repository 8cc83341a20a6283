"""What every transport promises (kv/transfer/base.py): one suite, run over each of them through real sockets."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import pytest

from splitserve.config import TransferSettings
from splitserve.deadlines import Deadline
from splitserve.errors import ChecksumMismatch, Fenced, KvMismatch, Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.cuda import Cuda
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import BlockPair, source_of
from splitserve.kv.transfer.reader import KvReader
from splitserve.protocol.handle import KvAddress
from support import kv
from support.fake_cuda import fake_cuda
from support.kv import (
    ALL,
    BLOCK_BYTES,
    BLOCKS,
    Owner,
    content,
    fill,
    leaves_nothing_behind,
    local_block,
    local_segment,
    needs_nixl,
    other_life,
    pairs_of,
)
from support.waiting import until

Name = Literal["shm", "tcp", "cuda_ipc", "tcp of a GPU", "nixl"]
EACH = pytest.mark.parametrize(
    "transport", [pytest.param(name, marks=needs_nixl) if name == "nixl" else name for name in get_args(Name)]
)
SENTINEL = b"\xee" * BLOCK_BYTES


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def protocol_of(transport: Name) -> Literal["shm", "tcp", "cuda_ipc", "nixl"]:
    return "tcp" if transport == "tcp of a GPU" else transport


def device_of(transport: Name) -> Cuda | None:
    """The pools of these are in the memory of a device, here a fake one."""
    return fake_cuda(delay_s=0.001) if transport in ("cuda_ipc", "tcp of a GPU") else None


def owner(
    directory: Path,
    transport: Name,
    *,
    checksum: Literal["all", "tcp", "off"] = "tcp",
    faults: str = "",
) -> AbstractAsyncContextManager[Owner]:
    return kv.owner(directory, protocol_of(transport), checksum=checksum, faults=faults, cuda=device_of(transport))


@asynccontextmanager
async def reader_of(
    transport: Name,
    segment: Segment | None = None,
    *,
    faults: str = "",
    checksum: Literal["all", "tcp", "off"] = "tcp",
    silence_s: float = 3.0,
) -> AsyncGenerator[tuple[KvReader, Segment]]:
    segment = segment or local_segment(cuda=device_of(transport))
    settings = TransferSettings(kv_transport=protocol_of(transport), kv_checksum=checksum)
    reader = KvReader(segment, settings, Faults(faults), silence_s=silence_s)
    try:
        yield reader, segment
    finally:
        await reader.close()
        segment.close()


@EACH
async def test_each_local_block_gets_its_remote_blocks_bytes_and_no_other_is_touched(
    transport: Name, directory: Path
) -> None:
    moves = [(3, 9), (4, 10), (5, 11), (9, 1), (8, 0), (31, 31), (0, 20)]
    async with owner(directory, transport) as p, reader_of(transport) as (reader, ours):
        await reader.attach(source_of(p.handle))
        result = await reader.fetch(p.handle, pairs_of(moves))
        for remote, local in moves:
            assert local_block(ours, local) == content(remote)
        untouched = set(range(BLOCKS)) - {local for _, local in moves}
        assert all(not any(local_block(ours, block)) for block in untouched)
        assert (result.blocks, result.bytes, result.transport) == (7, 7 * BLOCK_BYTES, protocol_of(transport))
        assert result.seconds > 0


@EACH
async def test_pairs_of_several_groups_may_come_mixed(transport: Name, directory: Path) -> None:
    async with owner(directory, transport) as p, reader_of(transport) as (reader, ours):
        groups = tuple(replace(p.handle.groups[0], group=group) for group in (0, 1))
        p.leases.grant("two groups", "key-2", p.handle.token, groups, 10.0, 0.0)
        handle = replace(p.handle, id="two groups", groups=groups)
        mixed = [BlockPair(at % 2, at, 30 - at, 1000 + at) for at in range(10)]
        await reader.fetch(handle, mixed)
        assert all(local_block(ours, pair.local) == content(pair.remote) for pair in mixed)


@EACH
async def test_many_fetches_at_once_do_not_mix(transport: Name, directory: Path) -> None:
    order = list(range(BLOCKS))
    random.Random(5).shuffle(order)
    async with owner(directory, transport) as p, reader_of(transport) as (reader, ours):
        await asyncio.gather(*(reader.fetch(p.handle, pairs_of([(block, order[block])])) for block in range(BLOCKS)))
        assert all(local_block(ours, order[block]) == content(block) for block in range(BLOCKS))


@EACH
async def test_nothing_to_fetch_asks_nobody(transport: Name, directory: Path) -> None:
    async with owner(directory, transport) as p, reader_of(transport) as (reader, _):
        assert (await reader.fetch(replace(p.handle, addresses=()), [])).blocks == 0


@EACH
async def test_a_cancelled_fetch_writes_nothing_afterwards(transport: Name, directory: Path) -> None:
    async with owner(directory, transport) as p, reader_of(transport, faults="kv.read_slow:0.03") as (reader, ours):
        await reader.attach(source_of(p.handle))
        fetch = asyncio.create_task(reader.fetch(p.handle, pairs_of(ALL[:20])))
        await until(lambda: local_block(ours, 1) == content(1), "the second block arrives")
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        fill(ours, range(20), SENTINEL)
        await reader.fetch(p.handle, pairs_of([(block, block) for block in range(20, 30)]))  # takes 0.3 s
        assert all(local_block(ours, block) == SENTINEL for block in range(20))
        assert all(local_block(ours, block) == content(block) for block in range(20, 30))


@EACH
async def test_a_fetch_that_is_cancelled_twice_still_waits_for_its_thread(transport: Name, directory: Path) -> None:
    async with owner(directory, transport) as p, reader_of(transport, faults="kv.read_slow:0.03") as (reader, ours):
        await reader.attach(source_of(p.handle))
        fetch = asyncio.create_task(reader.fetch(p.handle, pairs_of(ALL[:20])))
        await until(lambda: local_block(ours, 0) == content(0), "the first block arrives")
        fetch.cancel()
        await asyncio.sleep(0)
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        fill(ours, range(20), SENTINEL)
        await reader.fetch(p.handle, pairs_of([(30, 30), (31, 31)]))
        assert all(local_block(ours, block) == SENTINEL for block in range(20))


@EACH
async def test_a_fetch_past_its_deadline_is_unreachable_and_writes_nothing_afterwards(
    transport: Name, directory: Path
) -> None:
    async with owner(directory, transport) as p, reader_of(transport, faults="kv.read_slow:0.05") as (reader, ours):
        await reader.attach(source_of(p.handle))
        deadline = Deadline.after(0.12, time.monotonic(), "the hand-over")
        with pytest.raises(Unreachable, match="the time of the hand-over is over"):
            await reader.fetch(p.handle, pairs_of(ALL[:20]), deadline)
        fill(ours, range(20), SENTINEL)
        await reader.fetch(p.handle, pairs_of([(30, 30), (31, 31)]))
        assert all(local_block(ours, block) == SENTINEL for block in range(20))


@EACH
async def test_a_block_that_was_given_other_content_is_fenced(transport: Name, directory: Path) -> None:
    async with owner(directory, transport) as p, reader_of(transport) as (reader, _):
        p.segment.generations[7] += 1
        with pytest.raises(Fenced, match=r"block 7 .*1008.*1007"):
            await reader.fetch(p.handle, pairs_of(ALL))


@EACH
async def test_a_released_but_unwritten_block_fences_only_where_the_owner_is_asked(
    transport: Name, directory: Path
) -> None:
    async with owner(directory, transport) as p, reader_of(transport) as (reader, ours):
        assert p.leases.release(p.handle.id, p.handle.token)
        if protocol_of(transport) == "tcp":
            with pytest.raises(Fenced, match="not held"):
                await reader.fetch(p.handle, pairs_of([(2, 2)]))
        else:  # generations rise at reuse, not at release
            await reader.fetch(p.handle, pairs_of([(2, 2)]))
            assert local_block(ours, 2) == content(2)


@EACH
async def test_another_life_of_the_owner_is_a_mismatch(transport: Name, directory: Path) -> None:
    async with owner(directory, transport) as p, reader_of(transport) as (reader, _):
        with pytest.raises(KvMismatch, match="incarnation"):
            await reader.fetch(other_life(p.handle), pairs_of([(0, 0)]))


@EACH
@pytest.mark.parametrize(
    ("segment", "factor"),
    [
        (lambda cuda: local_segment(layout="another", cuda=cuda), "layout"),
        (lambda cuda: local_segment(block_bytes=BLOCK_BYTES * 2, cuda=cuda), "block bytes"),
    ],
)
async def test_pools_that_differ_are_a_mismatch_that_names_the_factor(
    transport: Name, directory: Path, segment: Callable[[Cuda | None], Segment], factor: str
) -> None:
    async with owner(directory, transport) as p, reader_of(transport, segment(device_of(transport))) as (reader, _):
        with pytest.raises(KvMismatch, match=factor):
            await reader.fetch(p.handle, pairs_of([(0, 0)]))


@EACH
async def test_a_block_number_outside_the_owners_pool_is_a_mismatch(transport: Name, directory: Path) -> None:
    async with owner(directory, transport) as p, reader_of(transport) as (reader, _):
        with pytest.raises(KvMismatch, match=f"block {BLOCKS}"):
            await reader.fetch(p.handle, [BlockPair(0, BLOCKS, 0, 1)])


async def test_a_local_block_outside_our_pool_is_our_own_mistake(directory: Path) -> None:
    async with owner(directory, "shm") as p, reader_of("shm") as (reader, _):
        with pytest.raises(ValueError, match="local block 32"):
            await reader.fetch(p.handle, pairs_of([(0, BLOCKS)]))


@EACH
async def test_a_bit_that_flips_in_a_held_block_is_found_with_checksums_on_all(
    transport: Name, directory: Path
) -> None:
    async with (
        owner(directory, transport, checksum="all", faults="kv.bitflip:6") as p,
        reader_of(transport, checksum="all") as (reader, ours),
    ):
        await reader.fetch(p.handle, pairs_of(ALL[:5]))
        assert local_block(ours, 4) == content(4)
        with pytest.raises(ChecksumMismatch, match="block 5 of prefill-0"):
            await reader.fetch(p.handle, pairs_of(ALL))
        p.exporter.hold(p.handle.groups)  # held again by a second request: the flip must not be blessed
        with pytest.raises(ChecksumMismatch):
            await reader.fetch(p.handle, pairs_of(ALL))


@EACH
async def test_whole_pools_pass_with_checksums_on_all(transport: Name, directory: Path) -> None:
    async with (
        owner(directory, transport, checksum="all") as p,
        reader_of(transport, checksum="all") as (reader, ours),
    ):
        await reader.fetch(p.handle, pairs_of(ALL))
        assert all(local_block(ours, block) == content(block) for block in range(BLOCKS))


def addresses(owner_made: Owner, name: str, address: str) -> tuple[KvAddress, ...]:
    host = owner_made.handle.addresses[0].host
    return (KvAddress(name, address, host),)


@EACH
async def test_an_owner_that_is_not_there_is_unreachable(transport: Name, directory: Path) -> None:
    async with owner(directory, transport) as p:
        pass
    async with reader_of(transport) as (reader, _):
        with pytest.raises(Unreachable, match=protocol_of(transport)):
            await reader.attach(source_of(p.handle))


@EACH
async def test_an_owner_that_takes_connections_but_never_answers_is_unreachable(
    transport: Name, directory: Path
) -> None:
    by_network = protocol_of(transport) in ("tcp", "nixl")
    listener = socket.socket(socket.AF_INET if by_network else socket.AF_UNIX)
    listener.bind(("127.0.0.1", 0) if by_network else str(directory / "silent"))
    listener.listen()
    name = listener.getsockname()
    address = name if isinstance(name, str) else f"127.0.0.1:{name[1]}"
    with listener:
        async with owner(directory, transport) as p, reader_of(transport, silence_s=0.2) as (reader, _):
            handle = replace(p.handle, addresses=addresses(p, protocol_of(transport), address))
            with pytest.raises(Unreachable, match=r"200 ms|no byte for 0.2 s"):
                await reader.fetch(handle, pairs_of([(0, 0)]))


@EACH
async def test_nothing_is_left_behind(transport: Name, directory: Path) -> None:
    async def a_life() -> int:
        async with owner(directory, transport) as p, reader_of(transport, faults="kv.read_slow:0.01") as (reader, ours):
            await reader.fetch(p.handle, pairs_of(ALL[:2]))
            fetch = asyncio.create_task(reader.fetch(p.handle, pairs_of(ALL)))
            await until(lambda: local_block(ours, 3) == content(3), "the fetch is under way")
            fetch.cancel()
            await asyncio.wait([fetch])
            p.segment.generations[0] += 1
            with pytest.raises(Fenced):
                await reader.fetch(p.handle, pairs_of(ALL))
        return p.leases.pins

    with leaves_nothing_behind(directory):
        assert await a_life() == 0
