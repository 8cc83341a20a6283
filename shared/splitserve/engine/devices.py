"""What the machine offers: the device, its free memory, the number formats that it is fast in."""

from __future__ import annotations

from pathlib import Path

import torch

from splitserve.errors import ConfigError
from splitserve.kv.host import available_memory


def pick_device(wanted: str) -> torch.device:
    """`auto` is a GPU if there is one. ConfigError when a GPU was asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def made_for_bfloat16(device: torch.device) -> bool:
    """Whether there is no question that bfloat16 is the faster format: a GPU's, or an x86 CPU that our kernels run on."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    offered = torch.cpu.get_capabilities()
    return any(offered.get(name) for name in ("avx512_bf16", "amx_bf16"))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`: on a CPU what the kernel or the container allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    room = _container_room()
    return available_memory() if room is None else min(room, available_memory())


def _container_room() -> int | None:
    """Limit less use of this process's own control group (version 2), the page cache counted as free."""
    group = Path("/sys/fs/cgroup")
    limit, current, statistics = group / "memory.max", group / "memory.current", group / "memory.stat"
    if not limit.exists() or not current.exists() or limit.read_text().strip() == "max":
        return None
    cached = 0
    if statistics.exists():
        cached = sum(
            int(line.split()[1]) for line in statistics.read_text().splitlines() if line.startswith("inactive_file ")
        )
    return int(limit.read_text()) - int(current.read_text()) + cached
