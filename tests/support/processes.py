"""Child processes in tests."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's environment with both roots of the package importable."""
    roots = os.pathsep.join(str(ROOT / root) for root in ("services", "shared"))
    return {**os.environ, "PYTHONPATH": roots, **more}


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it may end between two looks of psutil's, too
        return False
