"""How a machine's cores and memory are divided among workers. Pure but for the functions that look (`cores`, `free_memory`)."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from splitserve.errors import NotEnoughMemory

MIB = 1 << 20
GIB = 1 << 30
_PROCESS_BYTES = 400 * MIB  # torch, transformers and a worker's own objects, measured
_SMALLEST_POOL = 64 * MIB


@dataclass(frozen=True, slots=True)
class CoreShare:
    """One worker's part: torch threads, and processors to be pinned to (none: run anywhere)."""

    threads: int
    cpus: tuple[int, ...] = ()


def share_cores(cores: tuple[int, ...], limit: float, workers: int, threads: int = 0) -> list[CoreShare]:
    """Disjoint cores for each worker where they suffice; one thread, unpinned, where they do not.

    `cores` are ids of physical cores; `limit` is the CPU time quota in cores, which makes pinning pointless when it is
    below their number; `threads` is what the user asked for, 0 for an even division.
    """
    usable = int(min(len(cores), max(1.0, limit)))
    each = threads or max(1, usable // workers)
    if usable < len(cores) or each * workers > len(cores):
        return [CoreShare(each)] * workers
    return [CoreShare(each, cores[n * each : (n + 1) * each]) for n in range(workers)]


@dataclass(frozen=True, slots=True)
class MemoryShare:
    """Bytes that each worker takes."""

    pool: int
    weights: int


def share_memory(free: int, weights: int, workers: int, pool: int = 0) -> MemoryShare:
    """The KV pool of each worker on a CPU: what was asked for, else 1 GiB or its part of a quarter of free memory.

    Raises NotEnoughMemory, with both numbers, when workers, weights and pools do not fit into `free` bytes.
    """
    each = pool or max(_SMALLEST_POOL, min(GIB, free // 4 // workers))
    need = workers * (weights + each + _PROCESS_BYTES)
    if need > free:
        advice = "--prefill 0 runs one worker for both phases" if workers > 1 else "a smaller model is needed"
        raise NotEnoughMemory(
            f"{workers} workers need about {need / GIB:.1f} GiB ({_mib(weights)} weights and {_mib(each)} KV pool each), "
            f"{free / GIB:.1f} GiB are free: {advice}, and --kv-cache-memory-bytes makes the pools smaller"
        )
    return MemoryShare(each, weights)


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes of a model's weights in memory: the files' size, times what a wider `dtype` costs."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    checkpoint = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return stored * 2 if dtype == "float32" and checkpoint in {"bfloat16", "float16"} else stored


def cores() -> tuple[int, ...]:
    """One processor of each physical core that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    allowed = sorted(os.sched_getaffinity(0))
    first_of: dict[str, int] = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        key = siblings.read_text().strip() if siblings.is_file() else str(cpu)
        first_of.setdefault(key, cpu)
    return tuple(first_of.values())


def cpu_limit() -> float:
    """The container's CPU quota in cores; infinite without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def free_memory() -> int:
    """Bytes that new processes can have: the machine's, or less in a container."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform != "linux":
        return machine
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            machine = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return machine if limit == "max" else min(machine, max(0, int(limit) - used))
    except (OSError, ValueError):
        return machine


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is visible, told without torch."""
    return Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in {"", "-1"}


def _mib(size: int) -> str:
    return f"{size // MIB} MiB"
