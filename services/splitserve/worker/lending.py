"""Cores of idle workers used by decode workers of the same machine, changed between steps only.

Decode steps are short, so a core that its owner wants back is shared for one of them at most; a prefill worker's steps are
not, so it lends and never borrows: a lone long prompt is read by all cores because it goes to the idle decode worker.

The workers that one `splitserve serve` starts share a page, a file in its private folder. It has one row a worker, eight
bytes, native int64: the time (CLOCK_MONOTONIC, nanoseconds) until which that worker counts as busy. Only its owner writes a
row, so there are no locks. A killed worker's row runs out by itself.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitserve.errors import ConfigError

ROW_BYTES = 8
STEP_NS = 5_000_000_000  # a step that takes longer lends its core; a worker killed in one keeps it so long
CALM_NS = 50_000_000  # without work for so long before the core is lent: longer than between two prompts under load

Cores = tuple[int, ...]
Use = Callable[[Cores], None]


@dataclass(frozen=True, slots=True)
class Lending:
    """Whose page, which row is ours, the cores of each row, and how many rows, the first, only lend."""

    page: Path
    row: int
    lenders: int
    cores: tuple[Cores, ...]

    @property
    def own(self) -> Cores:
        return self.cores[self.row]

    def text(self) -> str:
        """As `SPLITSERVE_LENDING` carries it: `ROW/LENDERS/0,1/2,3@PAGE`."""
        cores = (",".join(map(str, each)) for each in self.cores)
        return "/".join([str(self.row), str(self.lenders), *cores]) + f"@{self.page}"

    @classmethod
    def parse(cls, text: str) -> Lending:
        """The inverse of `text`. Raises ConfigError."""
        told, _, page = text.partition("@")
        row, _, more = told.partition("/")
        lenders, *cores = more.split("/")
        try:
            return cls(Path(page), int(row), int(lenders), tuple(tuple(map(int, each.split(","))) for each in cores))
        except ValueError as error:
            raise ConfigError(
                f"SPLITSERVE_LENDING is {text!r}, not ROW/LENDERS/CORES/…@PAGE: leave it to splitserve serve"
            ) from error


def cores_to_use(busy_until: Sequence[int], lending: Lending, now: int) -> Cores:
    """The cores for the next step of our row: its own, and its part of those of idle workers.

    Idle workers are dealt out to the busy borrowers in turn, so that from one page no core goes to two workers.
    """
    row, cores = lending.row, lending.cores
    busy = [n for n, until in enumerate(busy_until) if until > now or n == row]
    idle = [n for n in range(len(cores)) if n not in busy]
    borrowers = [n for n in busy if n >= lending.lenders]
    ours = [n for turn, n in enumerate(idle) if borrowers and borrowers[turn % len(borrowers)] == row]
    return (*cores[row], *(core for n in ours for core in cores[n]))


def make_page(page: Path, workers: int) -> None:
    """A page on which everybody is idle."""
    page.write_bytes(bytes(ROW_BYTES * workers))


class Lender:
    """Called by the engine's thread round its steps. `use` sets the cores of that thread, and only when they change."""

    def __init__(self, lending: Lending, use: Use, clock: Callable[[], int] = time.monotonic_ns) -> None:
        with lending.page.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), ROW_BYTES * len(lending.cores))
        self._page = memoryview(self._map).cast("q")
        self._lending = lending
        self._use = use
        self._clock = clock
        self._used: Cores = ()  # so that the first step tells

    def before_step(self) -> None:
        now, lending = self._clock(), self._lending
        self._page[lending.row] = now + STEP_NS
        cores = cores_to_use(self._page, lending, now)
        if cores != self._used:
            self._use(cores)
            self._used = cores

    def after_step(self) -> None:
        self._page[self._lending.row] = self._clock() + CALM_NS
