"""How fast KV blocks move, against the least that moving as many bytes costs on this machine.

    python benchmarks/kv_transfer.py [--tokens 512 1024 2048 4096] [--dtype-bytes 4] [--repeats 40] [--checksum off|tcp|all]

An owner in a second process exports the KV of a prompt of SmolLM2-135M (30 layers, 3 KV heads, 64 wide, K and V; blocks of
16 tokens); the reader's pool is private memory, as a decode worker's is. `memcpy` is one numpy copy between two prefaulted
buffers; `socket` is the same bytes through a plain loopback connection between the two processes, one `sendall` and
`recv_into`. `nixl`, where it is installed, is held against memcpy, and `nixl tcp`, the same with UCX_TLS=tcp as between hosts
without RDMA, against the socket. Medians of alternating repeats with their quartiles; prints a table and, with --json, its
rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from splitserve.config import TransferSettings
from splitserve.faultpoints import Faults
from splitserve.kv.export import Exporter
from splitserve.kv.lease import LeaseTable
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import BlockPair
from splitserve.kv.transfer.reader import KvReader
from splitserve.protocol.handle import GroupBlocks, KvAddress, KvHandle

BLOCK_TOKENS = 16
VALUES_PER_TOKEN = 30 * 3 * 64 * 2
LAYOUT = "benchmark"
Checksum = Literal["off", "tcp", "all"]
Transport = Literal["shm", "tcp", "nixl"]
KINDS: dict[str, tuple[Transport, dict[str, str]]] = {  # what the transport is called, its environment
    "shm": ("shm", {}),
    "tcp": ("tcp", {}),
    "nixl": ("nixl", {}),
    "nixl tcp": ("nixl", {"UCX_TLS": "tcp"}),
}


@dataclass(frozen=True)
class Row:
    """Medians in milliseconds; `ratio` is the reference's time over the transport's, `spread_ms` the fetch's quartiles."""

    transport: str
    tokens: int
    mib: float
    reference_ms: float
    fetch_ms: float
    spread_ms: tuple[float, float]
    gb_per_s: float
    ratio: float


def main() -> None:
    options = parse()
    if options.serve:
        asyncio.run(serve(options.serve, options.transport, options.blocks, options.block_bytes, options.checksum))
        return
    table = [row for kind in installed() for row in measure(kind, options)]
    if options.json:
        print(json.dumps([asdict(row) for row in table]))
        return
    print(f"{'':10}{'tokens':>8}{'MiB':>8}{'reference':>12}{'fetch':>10}{'quartiles':>15}{'GB/s':>8}{'ratio':>8}")
    for row in table:
        print(
            f"{row.transport:10}{row.tokens:8}{row.mib:8.1f}{row.reference_ms:9.2f} ms{row.fetch_ms:7.2f} ms"
            f"{row.spread_ms[0]:8.2f}-{row.spread_ms[1]:<6.2f}"
            f"{row.gb_per_s:8.2f}{row.ratio:8.0%}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="KV transfer against memcpy and a plain socket")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--dtype-bytes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--checksum", choices=["off", "tcp", "all"], default="tcp")
    parser.add_argument("--json", action="store_true")
    for hidden in ("--serve", "--transport", "--blocks", "--block-bytes"):
        parser.add_argument(hidden, type=int if "block" in hidden else str, help=argparse.SUPPRESS)
    return parser.parse_args()


def installed() -> list[str]:
    """The kinds that can be measured here."""
    nixl = find_spec("nixl_cu12") is not None
    if not nixl:
        print("nixl is not installed (pip install 'splitserve[nixl]'): left out", file=sys.stderr)
    return [kind for kind, (transport, _) in KINDS.items() if transport != "nixl" or nixl]


def measure(kind: str, options: argparse.Namespace) -> list[Row]:
    transport, environment = KINDS[kind]
    os.environ.pop("UCX_TLS", None)
    os.environ.update(environment)
    block_bytes = BLOCK_TOKENS * VALUES_PER_TOKEN * options.dtype_bytes
    blocks = max(options.tokens) // BLOCK_TOKENS
    with tempfile.TemporaryDirectory(prefix="ss") as directory:
        command = [sys.executable, __file__, "--serve", directory, "--transport", transport, "--blocks", str(blocks)]
        command += ["--block-bytes", str(block_bytes), "--checksum", options.checksum]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
            try:
                assert owner.stdout is not None
                told = json.loads(owner.stdout.readline())
                handle = handle_of(blocks, tuple(KvAddress(**address) for address in told["addresses"]))
                ours = Segment.create(blocks, block_bytes, LAYOUT, 1, shared=False)
                return asyncio.run(rows(kind, ours, handle, told["plain"], options))
            finally:
                owner.kill()


async def rows(kind: str, ours: Segment, handle: KvHandle, plain_port: int, options: argparse.Namespace) -> list[Row]:
    return [await one(kind, tokens, ours, handle, plain_port, options) for tokens in options.tokens]


async def one(
    kind: str, tokens: int, ours: Segment, handle: KvHandle, plain_port: int, options: argparse.Namespace
) -> Row:
    count = tokens // BLOCK_TOKENS
    size = count * ours.block_bytes
    settings = TransferSettings(kv_transport=KINDS[kind][0], kv_checksum=options.checksum)
    reader = KvReader(ours, settings, Faults())
    pairs = [BlockPair(0, block, block, 0) for block in range(count)]
    reference, release = plain(plain_port, size) if kind.endswith("tcp") else memcpy(size)
    references: list[float] = []
    fetches: list[float] = []
    try:
        for _ in range(options.repeats + 2):
            began = time.perf_counter()
            reference()
            references.append(time.perf_counter() - began)
            began = time.perf_counter()
            await reader.fetch(handle, pairs)
            fetches.append(time.perf_counter() - began)
    finally:
        release()
        await reader.close()
    slow, fast = statistics.median(fetches[2:]), statistics.median(references[2:])  # the first two warm up
    quartiles = statistics.quantiles(fetches[2:], n=4)
    spread = quartiles[0] * 1e3, quartiles[2] * 1e3
    return Row(kind, tokens, size / 2**20, fast * 1e3, slow * 1e3, spread, size / slow / 1e9, fast / slow)


def memcpy(size: int) -> tuple[Callable[[], None], Callable[[], None]]:
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)

    def copy() -> None:
        target[:] = source

    return copy, lambda: None


def plain(port: int, size: int) -> tuple[Callable[[], None], Callable[[], None]]:
    connection = socket.create_connection(("127.0.0.1", port))
    target = memoryview(bytearray(size))

    def receive() -> None:
        connection.sendall(size.to_bytes(8, "little"))
        at = 0
        while at < size:
            at += connection.recv_into(target[at:])

    return receive, connection.close


def handle_of(blocks: int, addresses: tuple[KvAddress, ...]) -> KvHandle:
    groups = (GroupBlocks(0, tuple(range(blocks)), (0,) * blocks),)
    return KvHandle("h", "r", 1, "owner", 7, "f", 1, groups, "", "t", 1e9, addresses)


async def serve(directory: str, transport: Transport, blocks: int, block_bytes: int, checksum: Checksum) -> None:
    """The owner's process: the exporter, and a plain sender of as many bytes as it is asked for."""
    segment = Segment.create(blocks, block_bytes, LAYOUT, 7, checksummed=checksum == "all")
    np.frombuffer(segment.pool, np.uint8)[:] = 5
    leases = LeaseTable()
    settings = TransferSettings(kv_transport=transport, kv_checksum=checksum)
    exporter = Exporter("owner", segment, leases, settings, Path(directory), Faults())
    addresses = await exporter.start()
    handle = handle_of(blocks, addresses)
    exporter.hold(handle.groups)
    leases.grant("h", "key", "t", handle.groups, 1e9, 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        told = {"addresses": [asdict(address) for address in addresses], "plain": listener.getsockname()[1]}
        print(json.dumps(told), flush=True)
        await asyncio.to_thread(send_plainly, listener, segment)


def send_plainly(listener: socket.socket, segment: Segment) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            while asked := connection.recv(8, socket.MSG_WAITALL):
                connection.sendall(segment.pool[: int.from_bytes(asked, "little")])


if __name__ == "__main__":
    main()
