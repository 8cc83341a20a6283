"""KV out of another process's GPU memory: `cuda_ipc` beside a copy of as many bytes inside the device, and `tcp` through the
page-locked ring beside a plain copy to the host. Blocks as Llama 3.1 8B's (2 MiB of 16 tokens in bf16), 512 to 4,096 tokens.

`python benchmarks/kv_cuda.py [--repeats 20]`: both processes use the first GPU that is seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

import torch

from splitserve.config import TransferSettings
from splitserve.faultpoints import Faults
from splitserve.kv.cuda import Cuda, load_cuda
from splitserve.kv.device import DeviceMemory
from splitserve.kv.export import Exporter
from splitserve.kv.lease import LeaseTable
from splitserve.kv.segment import Segment
from splitserve.kv.transfer.base import BlockPair
from splitserve.kv.transfer.reader import KvReader
from splitserve.protocol.handle import GroupBlocks, KvAddress, KvHandle

BLOCK_TOKENS, BLOCK_BYTES, BLOCKS = 16, 2 << 20, 256
LIFE = 7
SETTINGS = TransferSettings(kv_checksum="off")


def pool(cuda: Cuda, life: int) -> Segment:
    return Segment.create(BLOCKS, BLOCK_BYTES, "bench", life, device=DeviceMemory(cuda, BLOCKS, BLOCK_BYTES))


def handle_of(addresses: tuple[KvAddress, ...]) -> KvHandle:
    groups = (GroupBlocks(0, tuple(range(BLOCKS)), (0,) * BLOCKS),)
    return KvHandle("h", "r", 1, "owner", LIFE, "f", 1, groups, "", "t", 1e9, addresses)


async def own(directory: Path, cuda: Cuda) -> None:
    """The owner's process: serves until its stdin ends."""
    segment, leases = pool(cuda, LIFE), LeaseTable()
    exporter = Exporter("owner", segment, leases, SETTINGS, directory, Faults())
    addresses = await exporter.start()
    leases.grant("h", "key", "t", handle_of(addresses).groups, 1e9, 0.0)
    print(json.dumps([asdict(address) for address in addresses]), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await exporter.close()
    segment.close()


async def median_s(run: Callable[[], Awaitable[object]], repeats: int) -> float:
    times: list[float] = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        await run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def copy_of(cuda: Cuda, target: int, source: int, size: int) -> Callable[[], Awaitable[object]]:
    stream = cuda.stream()

    async def copy() -> None:
        stream.copy(target, source, size)
        stream.wait()

    return copy


async def measure(addresses: tuple[KvAddress, ...], transport: str, repeats: int, cuda: Cuda) -> None:
    segment = pool(cuda, 1)
    spare = cuda.allocate(BLOCKS * BLOCK_BYTES)
    host = cuda.host_buffer(BLOCKS * BLOCK_BYTES)
    reader = KvReader(segment, TransferSettings(kv_transport=transport, kv_checksum="off"), Faults())  # type: ignore[arg-type]
    handle = handle_of(addresses)
    beside = "device copy" if transport == "cuda_ipc" else "copy to the host"
    target = spare if transport == "cuda_ipc" else host.address
    for tokens in (512, 1024, 2048, 4096):
        blocks = tokens // BLOCK_TOKENS
        pairs = [BlockPair(0, block, block, 0) for block in range(blocks)]
        size = blocks * BLOCK_BYTES
        assert segment.device is not None
        plain = await median_s(copy_of(cuda, target, segment.device.address, size), repeats)
        fetched = await median_s(lambda pairs=pairs: reader.fetch(handle, pairs), repeats)
        print(
            f"{transport:8} {tokens:5} tokens, {size >> 20:4} MiB: {fetched * 1e3:7.2f} ms, {size / fetched / 1e9:6.1f} GB/s; "
            f"{beside} {size / plain / 1e9:6.1f} GB/s, {plain / fetched:.0%}"
        )
    await reader.close()
    segment.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--own", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kv_cuda: torch sees no GPU here, and this measures nothing else")
    if options.own:
        asyncio.run(own(options.own, load_cuda()))
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--own", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
            line = owner.stdout.readline() if owner.stdout else ""
            addresses = tuple(KvAddress(**address) for address in json.loads(line))
            print(f"{torch.cuda.get_device_name()}; cuda_ipc: bar 70 %")
            for transport in ("cuda_ipc", "tcp"):
                asyncio.run(measure(addresses, transport, options.repeats, load_cuda()))
            owner.communicate()


if __name__ == "__main__":
    main()
