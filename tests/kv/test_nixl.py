"""Transport nixl beside the contract: real agents of NVIDIA's wheel, over UCX's shared memory and its tcp."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from splitserve.config import TransferSettings
from splitserve.errors import ConfigError, Fenced, Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.export import Exporter
from splitserve.kv.lease import LeaseTable
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import source_of
from splitserve.kv.transfer.nixl_card import Card
from splitserve.kv.transfer.reader import KvReader
from splitserve.kv.transfer.wire import HEADER
from support.fake_cuda import fake_cuda
from support.kv import (
    ALL,
    BLOCK_BYTES,
    BLOCKS,
    content,
    fill,
    local_block,
    local_segment,
    needs_nixl,
    owner,
    owner_process,
    pairs_of,
)
from support.waiting import until

NIXL = TransferSettings(kv_transport="nixl")
SENTINEL = b"\xee" * BLOCK_BYTES


@asynccontextmanager
async def reader_of(*, faults: str = "", silence_s: float = 3.0) -> AsyncGenerator[tuple[KvReader, Segment]]:
    segment = local_segment()
    reader = KvReader(segment, NIXL, Faults(faults), silence_s=silence_s)
    try:
        yield reader, segment
    finally:
        await reader.close()
        segment.close()


@pytest.fixture
def by_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX as between two hosts without RDMA: the owner's process must answer."""
    monkeypatch.setenv("UCX_TLS", "tcp")


@needs_nixl
async def test_another_processs_blocks_are_read(tmp_path: Path) -> None:
    with owner_process(tmp_path, "nixl") as p:
        async with reader_of() as (reader, ours):
            result = await reader.fetch(p.handle, pairs_of(ALL))
            assert (result.transport, result.blocks) == ("nixl", BLOCKS)
            assert all(local_block(ours, block) == content(block) for block in range(BLOCKS))


@needs_nixl
@pytest.mark.usefixtures("by_tcp")
async def test_another_hosts_blocks_are_read(tmp_path: Path) -> None:
    with owner_process(tmp_path, "nixl") as p:
        async with reader_of() as (reader, ours):
            await reader.fetch(p.handle, pairs_of(ALL))
            assert all(local_block(ours, block) == content(block) for block in range(BLOCKS))


@needs_nixl
async def test_a_dead_owner_is_unreachable_at_once(tmp_path: Path) -> None:
    with owner_process(tmp_path, "nixl") as p:
        async with reader_of(silence_s=60) as (reader, _):
            await reader.fetch(p.handle, pairs_of([(0, 0)]))
            p.kill()
            with pytest.raises(Unreachable):
                await asyncio.wait_for(reader.fetch(p.handle, pairs_of(ALL)), 5)


@needs_nixl
async def test_an_owner_that_dies_while_it_is_read_is_unreachable(tmp_path: Path) -> None:
    with owner_process(tmp_path, "nixl") as p:
        async with reader_of(faults="kv.read_slow:0.02", silence_s=60) as (reader, ours):
            fetch = asyncio.create_task(reader.fetch(p.handle, pairs_of(ALL)))
            await until(lambda: local_block(ours, 0) == content(0), "the reading has begun")
            p.kill()
            with pytest.raises(Unreachable):
                await asyncio.wait_for(fetch, 5)


@needs_nixl
@pytest.mark.usefixtures("by_tcp")
async def test_a_frozen_owner_is_unreachable_and_what_it_sends_when_it_wakes_reaches_nobody(tmp_path: Path) -> None:
    with owner_process(tmp_path, "nixl") as p:
        async with reader_of(silence_s=0.3) as (reader, ours):
            await reader.fetch(p.handle, pairs_of([(0, 0)]))
            p.freeze()
            with pytest.raises(Unreachable, match=r"did not end within 0.3 s"):
                await reader.fetch(p.handle, pairs_of(ALL))
            fill(ours, range(BLOCKS), SENTINEL)
            p.thaw()
            await reader.fetch(p.handle, pairs_of([(31, 31)]))  # a new agent, the same owner
            assert local_block(ours, 31) == content(31)
            assert all(local_block(ours, block) == SENTINEL for block in range(31))


@needs_nixl
@pytest.mark.usefixtures("by_tcp")
async def test_a_fetch_from_a_frozen_owner_can_be_cancelled(tmp_path: Path) -> None:
    with owner_process(tmp_path, "nixl") as p:
        async with reader_of(silence_s=60) as (reader, _):
            await reader.attach(source_of(p.handle))
            p.freeze()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.fetch(p.handle, pairs_of(ALL)), 0.1)


@needs_nixl
async def test_a_block_that_gets_new_content_while_it_is_read_is_fenced(tmp_path: Path) -> None:
    async with owner(tmp_path, "nixl") as p, reader_of(faults="kv.read_slow:0.01") as (reader, ours):
        fetch = asyncio.create_task(reader.fetch(p.handle, pairs_of(ALL)))
        await until(lambda: local_block(ours, 0) == content(0), "the reading has begun")
        p.segment.generations[0] += 1
        with pytest.raises(Fenced, match="block 0"):
            await fetch


@needs_nixl
async def test_an_owner_that_was_not_asked_for_nixl_is_unreachable_by_it(tmp_path: Path) -> None:
    async with owner(tmp_path, "auto") as p, reader_of() as (reader, _):
        assert [address.transport for address in p.handle.addresses] == ["shm", "tcp"]
        with pytest.raises(Unreachable, match="no way to the KV of prefill-0"):
            await reader.fetch(p.handle, pairs_of(ALL))


@needs_nixl
async def test_an_idle_owner_does_not_spin(tmp_path: Path) -> None:
    async with owner(tmp_path, "nixl"):
        used = sum(os.times()[:2])
        await asyncio.sleep(0.5)
        assert sum(os.times()[:2]) - used < 0.15


async def test_without_the_wheel_both_ends_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu12._bindings", None)
    monkeypatch.setitem(sys.modules, "nixl_cu12", None)
    segment = local_segment()
    try:
        with pytest.raises(ConfigError, match=r"pip install 'splitserve\[nixl\]'"):
            KvReader(segment, NIXL, Faults())
        with pytest.raises(ConfigError, match=r"pip install 'splitserve\[nixl\]'"):
            await Exporter("p", segment, LeaseTable(), NIXL, tmp_path, Faults()).start()
    finally:
        segment.close()


async def test_a_pool_in_a_gpus_memory_is_refused_at_both_ends(tmp_path: Path) -> None:
    segment = local_segment(cuda=fake_cuda())
    try:
        with pytest.raises(ConfigError, match="--kv-transport nixl cannot carry KV into a GPU's memory"):
            KvReader(segment, NIXL, Faults())
        with pytest.raises(ConfigError, match="--kv-transport nixl cannot carry KV out of a GPU's memory"):
            await Exporter("p", segment, LeaseTable(), NIXL, tmp_path, Faults()).start()
    finally:
        segment.close()


def test_a_card_survives_its_own_encoding() -> None:
    card = Card(7, "layout", 32, 4096, True, 1 << 47, 1 << 46, 1 << 45, b"\x00metadata\xff")
    assert Card.decode(card.encode()[HEADER.size :]) == card
