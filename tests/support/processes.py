"""Child processes in tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's environment with both roots of the package importable."""
    roots = os.pathsep.join(str(ROOT / root) for root in ("services", "shared"))
    return {**os.environ, "PYTHONPATH": roots, **more}


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    if sys.platform == "linux":
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        return state != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
