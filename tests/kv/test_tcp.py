"""Transport tcp: what the owner checks, and what happens when an end dies, freezes or lies."""

from __future__ import annotations

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.errors import BadMessage, ChecksumMismatch, Fenced, KvMismatch, PortTaken, Unreachable
from splitserve.faultpoints import Faults
from splitserve.kv.lease import LeaseTable
from splitserve.kv.transfer.base import BlockPair, source_of
from splitserve.kv.transfer.tcp import TcpTransport
from splitserve.kv.transfer.tcp_server import TcpServer
from splitserve.kv.transfer.wire import HEADER, Reply, Request, body_length
from support.kv import (
    ALL,
    BLOCK_BYTES,
    BLOCKS,
    Owner,
    content,
    local_block,
    local_segment,
    owner,
    owner_process,
    pairs_of,
)
from support.waiting import until


class Reader:
    """A tcp transport with all it needs, closed on leaving."""

    def __init__(self, *, faults: str = "", verify: bool = True, silence_s: float = 3.0) -> None:
        self.segment = local_segment()
        self._executor = ThreadPoolExecutor(4, thread_name_prefix="kv-fetch")
        self.transport = TcpTransport(self.segment, self._executor, Faults(faults), verify=verify, silence_s=silence_s)

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.transport.close()
        self._executor.shutdown()
        self.segment.close()

    def has(self, block: int) -> bool:
        return local_block(self.segment, block) == content(block)


async def test_a_wrong_token_and_an_unknown_handle_get_the_same_refusal(tmp_path: Path) -> None:
    async with owner(tmp_path, "tcp") as p, Reader() as reader:
        refusals: list[str] = []
        for handle in (replace(p.handle, token="0" * 32), replace(p.handle, id="handle-2")):
            with pytest.raises(Fenced) as refusal:
                await reader.transport.fetch(handle, pairs_of([(0, 0)]))
            refusals.append(refusal.value.message.replace(handle.id, "…"))
        assert refusals[0] == refusals[1]
        assert p.exporter.counts.refused == 2
        assert not any(reader.segment.pool)


async def test_only_blocks_of_the_handle_are_served(tmp_path: Path) -> None:
    async with owner(tmp_path, "tcp", blocks=range(8)) as p, Reader() as reader:
        with pytest.raises(KvMismatch, match="block 8 of group 0 is not part of handle handle-1"):
            await reader.transport.fetch(p.handle, pairs_of([(7, 7), (8, 8)]))
        with pytest.raises(KvMismatch, match="block 7 of group 1"):
            await reader.transport.fetch(p.handle, [BlockPair(1, 7, 7, 1007)])
        await reader.transport.fetch(p.handle, pairs_of([(7, 7)]))  # the connection serves on after a refusal
        assert (reader.has(7), p.exporter.counts.requests, p.exporter.counts.refused) == (True, 3, 2)


async def test_a_killed_owner_is_unreachable_at_once(tmp_path: Path) -> None:
    with owner_process(tmp_path, "tcp") as p:
        async with Reader(faults="kv.read_slow:0.002") as reader:
            far_more_than_is_on_the_way = pairs_of(ALL * 30)
            fetch = asyncio.create_task(reader.transport.fetch(p.handle, far_more_than_is_on_the_way))
            await until(lambda: reader.has(0), "the first block arrives")
            p.kill()
            began = time.monotonic()
            with pytest.raises(Unreachable, match=r"closed after|reset"):
                await fetch
            assert time.monotonic() - began < 2, "no silence is waited for"


async def test_a_frozen_owner_is_unreachable_after_the_silence_that_is_allowed(tmp_path: Path) -> None:
    with owner_process(tmp_path, "tcp") as p:
        async with Reader(silence_s=0.3) as reader:
            await reader.transport.attach(source_of(p.handle))
            p.freeze()
            began = time.monotonic()
            with pytest.raises(Unreachable, match=r"no byte for 0\.3 s, after 0 of"):
                await reader.transport.fetch(p.handle, pairs_of(ALL))
            assert 0.3 <= time.monotonic() - began < 2


async def test_a_connection_is_used_again_and_one_whose_end_came_is_not(tmp_path: Path) -> None:
    async with Reader() as reader:
        async with owner(tmp_path, "tcp") as p:
            for _ in range(3):
                await reader.transport.fetch(p.handle, pairs_of([(1, 1)]))
            assert p.exporter.tcp_connections == 1
        async with owner(tmp_path, "tcp", port=port_of(p)) as again:
            await reader.transport.fetch(again.handle, pairs_of([(2, 2)]))
            assert reader.has(2)
            assert again.exporter.tcp_connections == 1


async def test_an_idle_connection_to_a_dead_owner_is_closed(tmp_path: Path) -> None:
    async with Reader() as reader:
        async with owner(tmp_path, "tcp") as p:
            await reader.transport.attach(source_of(p.handle))
            reader.transport.retain([])
            assert reader.transport.idle_connections == 1
        reader.transport.retain([])
        assert reader.transport.idle_connections == 0


async def test_a_lease_that_ends_under_a_slow_reader_cuts_it_off_and_only_then_frees(tmp_path: Path) -> None:
    big = 1 << 20  # the pool is more than the kernel takes in without the reader
    async with owner(tmp_path, "tcp", block_bytes=big) as p:
        connection = await connect(p)
        with connection:
            await asyncio.get_running_loop().sock_sendall(connection, request_of(p).encode())
            await until(lambda: p.leases.pins == 1, "the server begins to send")
            assert p.leases.expire(0.0) == []
            assert p.end_lease() == [], "the sender still reads the blocks"
            await until(lambda: p.leases.pins == 0, "the sender is out")
            assert p.end_lease() == ["key-1"]
            assert p.exporter.counts.severed == 1
            received = await drain(connection)
            assert received < BLOCKS * big


async def test_an_exporter_that_closes_does_not_wait_for_a_slow_reader(tmp_path: Path) -> None:
    async with owner(tmp_path, "tcp", block_bytes=1 << 20) as p:
        connection = await connect(p)
        with connection:
            await asyncio.get_running_loop().sock_sendall(connection, request_of(p).encode())
            await until(lambda: p.leases.pins == 1, "the server begins to send")
            async with asyncio.timeout(5):
                await p.exporter.close()
            assert p.leases.pins == 0


async def test_a_bit_that_flips_after_the_sender_summed_it_is_found(tmp_path: Path) -> None:
    async with owner(tmp_path, "tcp", faults="kv.bitflip:3") as p, Reader() as reader:
        with pytest.raises(ChecksumMismatch, match="block 2"):
            await reader.transport.fetch(p.handle, pairs_of(ALL))


async def test_with_checksums_off_a_flipped_bit_passes(tmp_path: Path) -> None:
    async with owner(tmp_path, "tcp") as p, Reader(verify=False) as reader:
        p.segment.pool[0] ^= 1
        await reader.transport.fetch(p.handle, pairs_of(ALL))
        assert not reader.has(0)
        assert reader.has(1)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n", HEADER.pack(b"SSKV", 99, 0, 0), HEADER.pack(b"SSKV", 1, 0, 1 << 31)]
)
async def test_what_is_no_request_is_refused_and_the_server_serves_on(tmp_path: Path, garbage: bytes) -> None:
    async with owner(tmp_path, "tcp") as p, Reader() as reader:
        connection = await connect(p)
        with connection:
            await asyncio.get_running_loop().sock_sendall(connection, garbage)
            reply = await receive_reply(connection)
            assert reply.code == "mismatch"
            assert await drain(connection) == 0
        await reader.transport.fetch(p.handle, pairs_of([(0, 0)]))
        assert reader.has(0)


async def test_an_owner_that_answers_nonsense_is_a_mismatch(tmp_path: Path) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, owner(tmp_path, "tcp") as p, Reader() as reader:
        port = server.sockets[0].getsockname()[1]
        handle = replace(p.handle, addresses=(replace(p.handle.addresses[0], address=f"127.0.0.1:{port}"),))
        with pytest.raises(KvMismatch, match="not a KV frame"):
            await reader.transport.fetch(handle, pairs_of([(0, 0)]))


async def test_a_taken_port_and_a_host_that_is_not_ours_are_one_clear_line_each(tmp_path: Path) -> None:
    segment = local_segment()
    with ThreadPoolExecutor(1) as executor, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, at in (("127.0.0.1", port), ("192.0.2.1", 0)):
            with pytest.raises(PortTaken, match=f"{host}:{at} .--kv-host, --kv-port"):
                TcpServer(segment, LeaseTable(), executor, Faults(), host, at).start()
    segment.close()


def test_frames_survive_the_wire() -> None:
    request = Request("h", "t", (1 << 64) - 1, "layout", 4096, True, ((0, (1, 2, (1 << 32) - 1)), (3, ())))
    frame = request.encode()
    assert body_length(frame[: HEADER.size]) == len(frame) - HEADER.size
    assert Request.decode(frame[HEADER.size :]) == request
    reply = Reply("fenced", "é")
    assert Reply.decode(reply.encode()[HEADER.size :]) == reply
    assert "'t'" not in repr(request), "a token never shows in a log line"


@pytest.mark.parametrize("body", [b"", b"\x02\x00\x00\x00{}", b"\xff\x00\x00\x00", b"\x02\x00\x00\x00[]"])
def test_a_body_that_is_no_message_is_a_bad_message(body: bytes) -> None:
    with pytest.raises(BadMessage):
        Request.decode(body)
    with pytest.raises(BadMessage):
        Reply.decode(body)


def test_a_request_that_miscounts_its_blocks_is_a_bad_message() -> None:
    frame = Request("h", "t", 1, "layout", 1, True, ((0, (1, 2)),)).encode()
    with pytest.raises(BadMessage, match="counts 2 blocks and carries 3"):
        Request.decode(frame[HEADER.size :] + bytes(4))


def port_of(p: Owner) -> int:
    return int(p.handle.addresses[0].address.rpartition(":")[2])


def request_of(p: Owner) -> Request:
    s = p.segment
    return Request(
        p.handle.id, p.handle.token, s.incarnation, s.layout_digest, s.block_bytes, True, ((0, tuple(range(BLOCKS))),)
    )


async def connect(p: Owner) -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port_of(p)))
    return connection


async def receive_reply(connection: socket.socket) -> Reply:
    loop = asyncio.get_running_loop()
    frame = b""
    async with asyncio.timeout(5):
        while len(frame) < HEADER.size or len(frame) < HEADER.size + body_length(frame[: HEADER.size]):
            frame += await loop.sock_recv(connection, 1)
    return Reply.decode(frame[HEADER.size :])


async def drain(connection: socket.socket) -> int:
    """Bytes until the other end is through; a reset is an end too."""
    count = 0
    async with asyncio.timeout(5):
        try:
            while data := await asyncio.get_running_loop().sock_recv(connection, BLOCK_BYTES):
                count += len(data)
        except ConnectionResetError:
            return count
    return count
