"""What a measurement leaves: a JSON file a part in `.bench/`, with the machine, the commit and the command beside the numbers."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".bench"
_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of `n` repeats."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """ValueError for no values."""
        if not values:
            raise ValueError("no repeats to take a median of")
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)} to {_short(self.high)})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of ours to theirs, round by round: what disturbed a round disturbed both."""
    return Spread.of([one / other for one, other in zip(ours, theirs, strict=True) if other])


def save(part: str, figures: dict[str, Any]) -> Path:
    """Keep one part's figures, and where and how they were made."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{part}.json"
    command = " ".join(["make bench", f"PART={part}", *([f"ARGS='{' '.join(sys.argv[2:])}'"] if sys.argv[2:] else [])])
    about = {"command": command, "machine": asdict(machine()), "when": datetime.now(UTC).date().isoformat()}
    path.write_text(json.dumps({**about, "commit": commit(), "figures": figures}, indent=1))
    return path


def load(part: str) -> dict[str, Any] | None:
    """What `save` kept, or None where that part was not run."""
    path = FOLDER / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


@dataclass(frozen=True, slots=True)
class Machine:
    """Where numbers were made."""

    cpu: str
    cores: int
    instructions: tuple[str, ...]
    memory_gib: int
    python: str


def machine() -> Machine:
    """This one."""
    cpu, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            cpu = value.strip()
        if name.strip() in {"flags", "Features"}:
            flags = set(value.split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    found = tuple(flag for flag in _FLAGS if flag in flags)
    return Machine(cpu, os.cpu_count() or 1, found, memory, platform.python_version())


def commit() -> str:
    """The tree's, with a plus where files were changed since."""
    ran = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return ran.stdout.strip() or "unknown"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
