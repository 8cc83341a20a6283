"""Transport shm: what one-sided reading of another process's memory must survive."""

from __future__ import annotations

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.errors import ConfigError, Fenced, KvMismatch, Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import source_of
from splitserve.kv.transfer.shm import ShmTransport
from splitserve.kv.transfer.shm_server import ShmServer
from splitserve.protocol.handle import KvAddress, KvSource
from support.kv import (
    ALL,
    BLOCKS,
    LIFE,
    content,
    local_block,
    local_segment,
    owner,
    owner_process,
    pairs_of,
)
from support.waiting import until


class Reader:
    """A shm transport with all it needs, closed on leaving."""

    def __init__(self, *, faults: str = "", verify: bool = False) -> None:
        self.segment = local_segment()
        self._executor = ThreadPoolExecutor(4, thread_name_prefix="kv-fetch")
        self.transport = ShmTransport(self.segment, self._executor, Faults(faults), verify=verify)

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.transport.close()
        self._executor.shutdown()
        self.segment.close()

    def has(self, block: int) -> bool:
        return local_block(self.segment, block) == content(block)


async def test_a_killed_owners_blocks_are_still_read(tmp_path: Path) -> None:
    with owner_process(tmp_path, "shm") as p:
        async with Reader() as reader:
            await reader.transport.attach(source_of(p.handle))
            p.kill()
            await reader.transport.fetch(p.handle, pairs_of(ALL))
            assert all(reader.has(block) for block in range(BLOCKS))


async def test_a_frozen_owners_blocks_are_still_read(tmp_path: Path) -> None:
    with owner_process(tmp_path, "shm") as p:
        async with Reader() as reader:
            await reader.transport.attach(source_of(p.handle))
            p.freeze()
            await reader.transport.fetch(p.handle, pairs_of(ALL))
            assert all(reader.has(block) for block in range(BLOCKS))


async def test_an_owner_that_froze_before_we_attached_is_unreachable_within_the_limit(tmp_path: Path) -> None:
    with owner_process(tmp_path, "shm") as p:
        p.freeze()
        async with Reader() as reader:
            with pytest.raises(Unreachable, match="does not answer within 200 ms"):
                await reader.transport.attach(source_of(p.handle))


async def test_a_dead_owners_memory_is_kept_while_a_handle_names_it_and_no_longer(tmp_path: Path) -> None:
    with owner_process(tmp_path, "shm") as p:
        async with Reader() as reader:
            await reader.transport.attach(source_of(p.handle))
            p.kill()
            key = (p.handle.owner, p.handle.incarnation)
            await until(lambda: reader.transport.dead == (key,), "the owner's death is noticed")
            reader.transport.retain([key])
            await reader.transport.fetch(p.handle, pairs_of([(4, 4)]))
            assert reader.has(4)
            reader.transport.retain([])
            with pytest.raises(Unreachable, match="takes no connection"):
                await reader.transport.fetch(p.handle, pairs_of([(5, 5)]))


async def test_a_living_owners_memory_is_kept_though_no_handle_names_it(tmp_path: Path) -> None:
    async with owner(tmp_path, "shm") as p, Reader() as reader:
        await reader.transport.attach(source_of(p.handle))
        reader.transport.retain([])
        await reader.transport.fetch(replace(p.handle, addresses=()), pairs_of([(1, 1)]))
        assert reader.has(1)


async def test_a_block_that_gets_new_content_while_it_is_copied_is_fenced(tmp_path: Path) -> None:
    async with owner(tmp_path, "shm") as p, Reader(faults="kv.read_slow:0.01") as reader:
        fetch = asyncio.create_task(reader.transport.fetch(p.handle, pairs_of(ALL)))
        await until(lambda: reader.has(0), "the copy has begun")
        p.segment.generations[0] += 1
        with pytest.raises(Fenced, match="block 0"):
            await fetch


async def test_two_that_attach_at_once_share_one_map(tmp_path: Path) -> None:
    async with owner(tmp_path, "shm") as p, Reader() as reader:
        await asyncio.gather(*(reader.transport.attach(source_of(p.handle)) for _ in range(4)))
        await until(lambda: p.exporter.shm_readers == 1, "the three other connections are given up")


async def test_the_owner_forgets_a_reader_that_left(tmp_path: Path) -> None:
    async with owner(tmp_path, "shm") as p:
        async with Reader() as reader:
            await reader.transport.attach(source_of(p.handle))
            await until(lambda: p.exporter.shm_readers == 1, "the reader is counted")
        await until(lambda: p.exporter.shm_readers == 0, "the reader is forgotten")


async def test_only_the_owners_user_may_connect_and_another_is_refused(tmp_path: Path) -> None:
    segment = local_segment()
    server = ShmServer(segment, tmp_path / "p.kv", uid=os.getuid() + 1)
    server.start()
    source = KvSource("p", 1, (KvAddress("shm", str(tmp_path / "p.kv")),))
    try:
        assert stat.S_IMODE((tmp_path / "p.kv").stat().st_mode) == 0o600
        async with Reader() as reader:
            with pytest.raises(Unreachable, match="another user"):
                await reader.transport.attach(source)
        assert server.refused == 1
    finally:
        await server.close()
        segment.close()


async def test_an_owner_without_checksums_is_a_mismatch_for_a_reader_that_wants_them(tmp_path: Path) -> None:
    async with owner(tmp_path, "shm") as p, Reader(verify=True) as reader:
        with pytest.raises(KvMismatch, match=r"^checksum: --kv-checksum=all"):
            await reader.transport.attach(source_of(p.handle))


async def test_a_dead_owners_socket_is_replaced_and_a_successors_is_left_alone(tmp_path: Path) -> None:
    segment = local_segment()
    path = tmp_path / "p.kv"
    first, second = ShmServer(segment, path), ShmServer(segment, path)
    first.start()
    second.start()
    await first.close()
    assert path.exists()
    async with Reader() as reader:
        await reader.transport.attach(KvSource("p", 1, (KvAddress("shm", str(path)),)))
    await second.close()
    assert not path.exists()
    segment.close()


async def test_a_socket_path_that_no_system_takes_is_one_clear_line(tmp_path: Path) -> None:
    segment = local_segment()
    with pytest.raises(ConfigError, match=r"bytes, 103 are the most: shorten --kv-socket-dir"):
        ShmServer(segment, tmp_path / ("x" * 120)).start()
    with pytest.raises(ConfigError, match="No such file"):
        ShmServer(segment, tmp_path / "missing" / "p.kv").start()
    segment.close()


async def test_a_cancelled_attach_keeps_nothing(tmp_path: Path) -> None:
    async with owner(tmp_path, "shm") as p, Reader() as reader:
        attach = asyncio.create_task(reader.transport.attach(source_of(p.handle)))
        await asyncio.sleep(0)
        attach.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attach
        await until(lambda: p.exporter.shm_readers == 0, "the connection is given up")
        assert reader.transport.attached == ()


async def test_a_newer_life_is_attached_beside_the_older(tmp_path: Path) -> None:
    segments = [Segment.create(BLOCKS, 64 << 10, "test layout", LIFE + at) for at in range(2)]
    servers = [ShmServer(segment, tmp_path / f"{at}.kv") for at, segment in enumerate(segments)]
    async with Reader() as reader:
        for at, server in enumerate(servers):
            server.start()
            source = KvSource("p", LIFE + at, (KvAddress("shm", str(tmp_path / f"{at}.kv")),))
            await reader.transport.attach(source)
        assert reader.transport.attached == (("p", LIFE), ("p", LIFE + 1))
        await servers[0].close()
        await until(lambda: reader.transport.dead == (("p", LIFE),), "the end of the older is noticed")
        reader.transport.retain([])
        assert reader.transport.attached == (("p", LIFE + 1),)
    await servers[1].close()
    for segment in segments:
        segment.close()
