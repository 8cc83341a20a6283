"""What memory a served cluster takes, and whether it grows: `splitserve serve` before and after many short requests.

    python benchmarks/memory.py --model FOLDER [--requests 10000] [--steps 10] [--pool-mib 256] [--flags "…"]

Linux. Each KV pool is to be exactly as sized: less than a block under what was asked for. Resident memory (RSS) of router,
prefill and decode worker, step by step; in brackets what of it no other process shares (anonymous: neither shared pools nor
mapped weights and libraries; decode's own pool is private, and among it). Bars: the router under 150 MiB, and pools as asked
for, which is told where Linux knows huge pages. A worker's RSS holds its pool from the start, and decode's the pools that it
reads; neither is a reason for anonymous memory to grow.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import asking, peers
from bench.peers import Served
from bench.processes import family, stop_on_sigterm
from support.servers import free_port

ROUTER_BAR_MIB = 150
ROLES = ("router", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Resident:
    """MiB of one process: all, and what is its alone."""

    rss: float
    anonymous: float

    @classmethod
    def of(cls, status: str) -> Resident:
        """Out of the text of `/proc/PID/status`."""
        fields = dict(line.split(":", 1) for line in status.splitlines())
        rss, anonymous = (int(fields[name].removesuffix(" kB")) / 1024 for name in ("VmRSS", "RssAnon"))
        return cls(rss, anonymous)

    def __str__(self) -> str:
        return f"{self.rss:.0f} ({self.anonymous:.1f})"


@dataclass(frozen=True, slots=True)
class Pool:
    """A worker's, in bytes. `mapped`: its segment as the kernel has it, with the header and a generation a block."""

    worker: str
    asked: int
    blocks: int
    size: int
    mapped: int

    @property
    def exact(self) -> bool:
        """As many blocks as fit, and nothing mapped beside them but the header's pages."""
        block = self.size // self.blocks
        return 0 <= self.asked - self.size < block and 0 <= self.mapped - self.size < 2**20

    def __str__(self) -> str:
        verdict = "met" if self.exact else "missed"
        sizes = f"{self.asked} bytes asked for, {self.blocks} blocks of {self.size // self.blocks} = {self.size}"
        return f"pool of {self.worker}: {sizes}, {self.mapped} mapped: {verdict}"


def main() -> int:
    given = _parse()
    stop_on_sigterm()
    flags = ["--split", "always", "--kv-cache-memory-bytes", str(given.pool_mib << 20), *given.flags.split()]
    rng = random.Random()
    with peers.splitserve(given.model, free_port(), flags) as served:
        members = processes_of(served)
        pools = [_pool(served, members, role, given.pool_mib << 20) for role in ("prefill", "decode")]
        print(*pools, sep="\n")
        print(f"{'requests':>10}" + "".join(f"{role + ' MiB':>18}" for role in ROLES) + f"{'a second':>10}")
        steps = [_step(0, members, 0.0)]
        for number in range(1, given.steps + 1):
            count = given.requests // given.steps
            began = time.monotonic()
            asking.ask(served.url, asking.prompts(rng, count, given.tokens), 2, given.at_a_time)
            steps.append(_step(number * count, members, count / (time.monotonic() - began)))
    router = max(step["router"].rss for step in steps)
    print(f"router, most: {router:.0f} MiB, bar {ROUTER_BAR_MIB}: {'met' if router < ROUTER_BAR_MIB else 'missed'}")
    if len(steps) > 2:
        print(growth(steps))
    return int(router >= ROUTER_BAR_MIB or not all(pool.exact for pool in pools))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16, help="of a prompt; an answer has 2")
    parser.add_argument("--at-a-time", type=int, default=32)
    parser.add_argument("--pool-mib", type=int, default=256, help="of each worker; it must hold a context of 2048")
    parser.add_argument("--flags", default="", help="more flags for splitserve serve")
    return parser.parse_args()


def processes_of(served: Served) -> dict[str, int]:
    """Role -> process id."""
    found: dict[str, int] = {}
    for member in family(served.roots):
        command = member.cmdline()
        for role in ROLES:
            if command[1:4] == ["-m", "splitserve", role]:
                found[role] = member.pid
    if missing := set(ROLES) - set(found):
        raise RuntimeError(f"there is no process of {', '.join(sorted(missing))}")
    return found


def _pool(served: Served, members: Mapping[str, int], role: str, asked: int) -> Pool:
    ((worker, blocks, size),) = [
        (labels["engine"], int(labels["num_gpu_blocks"]), int(labels["kv_cache_memory_bytes"]))
        for labels, _ in asking.samples(served.url, "vllm:cache_config_info")
        if labels["engine"].startswith(role)
    ]
    return Pool(worker, asked, blocks, size, mapped(Path(f"/proc/{members[role]}/smaps").read_text().splitlines()))


def mapped(smaps: Iterable[str]) -> int:
    """Bytes of the worker's own pool in the lines of `/proc/PID/smaps`: what it may write to, shared (prefill's) or private
    (decode's, which has no name: nothing else of a worker asks for huge pages and is kept from children)."""
    total, size, named = 0, 0, False
    for line in smaps:
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            low, high = (int(bound, 16) for bound in fields[0].split("-"))
            size, named = high - low, "memfd:splitserve-kv" in line and "w" in fields[1]
        elif fields[0] == "VmFlags:" and (named or {"wr", "hg", "dc"} <= set(fields)):
            total += size
    return total


def _step(requests: int, members: Mapping[str, int], rate: float) -> dict[str, Resident]:
    now = {role: Resident.of(Path(f"/proc/{pid}/status").read_text()) for role, pid in members.items()}
    print(f"{requests:>10}" + "".join(f"{now[role]!s:>18}" for role in ROLES) + f"{rate:>10.0f}", flush=True)
    return now


def growth(steps: list[dict[str, Resident]]) -> str:
    """Of what is each process's alone, from the first requests on: what was loaded by need is loaded by then."""
    grown = {role: steps[-1][role].anonymous - steps[1][role].anonymous for role in ROLES}
    said = ", ".join(f"{role} {mib:+.1f}" for role, mib in grown.items())
    return f"anonymous memory after the last step less after the first, MiB: {said}"


if __name__ == "__main__":
    sys.exit(main())
