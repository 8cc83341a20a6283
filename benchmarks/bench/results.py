"""What a measurement leaves: a JSON file a part in `.bench/`, with the machine, the commit and the command beside the numbers."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
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


def write(part: str, kept: Mapping[str, Any]) -> None:
    """Keep it in place of what was kept; a process killed meanwhile leaves the one or the other."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{part}.json"
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(kept, indent=1))
    unfinished.replace(path)


def load(part: str) -> dict[str, Any] | None:
    """What `write` kept, or None where that part was not run."""
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
    """The tree's, with a plus where code was changed since."""
    name = _git("describe", "--always")
    return (name + ("+" if _git("status", "--porcelain", "services", "shared", "benchmarks") else "")) or "unknown"


def _git(*arguments: str) -> str:
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout.strip()


def command(part: str, arguments: Sequence[str]) -> str:
    """What measures a part again; where a folder lies on this machine is nobody's business."""
    shown = [f'"{argument}"' if " " in argument else argument for argument in map(_general, arguments)]
    return " ".join(["make bench", f"PART={part}", *([f"ARGS='{' '.join(shown)}'"] if shown else [])])


def _general(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}FOLDER" if value.startswith("/") else argument


@dataclass(frozen=True, slots=True)
class About:
    """Where and how figures are made, taken when it begins: the tree may change meanwhile."""

    command: str
    when: str
    commit: str

    @classmethod
    def now(cls, command: str) -> About:
        return cls(command, datetime.now(UTC).date().isoformat(), commit())

    def fields(self) -> dict[str, Any]:
        """As they are kept, now that it is over."""
        until = commit()
        tree = self.commit if until == self.commit else f"{self.commit} to {until}"
        return {"command": self.command, "machine": asdict(machine()), "when": self.when, "commit": tree}


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
