"""What the KV rooms ask of the machine: which one it is, and how much memory is left."""

from __future__ import annotations

import os
import platform
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux; the same in every container of one host
_MEMINFO = Path("/proc/meminfo")


def boot_id() -> str:
    """Names this boot of this machine: two processes with the same one can share memory.

    Elsewhere than on Linux it is the machine's name and network address.
    """
    if _BOOT_ID.exists():
        return _BOOT_ID.read_text().strip()
    return f"{platform.node()}-{uuid.getnode():x}"


def available_memory() -> int:
    """Bytes that may still be taken without swapping; a container's own limit is not in it.

    Elsewhere than on Linux it is all of the machine's memory.
    """
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
