"""What `make bench PART=serving` asks of each system, and how a run of the generator becomes figures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import load
from bench.load import Load

RATES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)  # requests a second
FIRST_RUNG = 3
_ENOUGH = 0.9  # of the requests must keep both objectives
_FEWEST, _SECONDS_MOST, _SECONDS_LEAST = 20, 40, 10  # of a probe


@dataclass(frozen=True, slots=True)
class Workload:
    """`figures`: what a run is boiled down to, by name. `search`: the highest rate that keeps `load.goodput` is sought."""

    load: Load
    figures: Mapping[str, Callable[[dict[str, Any]], float]]
    search: bool = False


def _milliseconds(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: float(result[name])


_SATURATED = {
    "requests a second": lambda r: float(r["request_throughput"]),
    "mean TTFT, ms": _milliseconds("mean_ttft_ms"),
    "mean TPOT, ms": _milliseconds("mean_tpot_ms"),
    "p99 inter-token latency, ms": _milliseconds("p99_itl_ms"),
}
_ALONE = {"TTFT, ms": _milliseconds("median_ttft_ms"), "TPOT, ms": _milliseconds("median_tpot_ms")}
_PREFIX = {
    "cold TTFT, ms": lambda r: 1e3 * float(r["ttfts"][0]),
    "repeated TTFT, ms": lambda r: 1e3 * sorted(r["ttfts"][1:])[len(r["ttfts"][1:]) // 2],
}
WORKLOADS: Mapping[str, Workload] = {
    "256/64 c=16": Workload(Load(256, 64, 52, 16), _SATURATED),
    "1024/64 c=8": Workload(Load(1024, 64, 64, 8), _SATURATED),  # eight waves: the first and the last fill no batch
    "256/64 c=1": Workload(Load(256, 64, 6, 1), _ALONE),
    "1000-token prefix c=1": Workload(Load(24, 8, 6, 1, prefix=1000), _PREFIX),
    "256/64 goodput": Workload(Load(256, 64, 30, goodput=(1000, 40)), {}, search=True),
    "1024/64 goodput": Workload(Load(1024, 64, 20, goodput=(2000, 40)), {}, search=True),
}

_WITH_PAIR = ", beside its pair too"


def title(name: str, *, pair: bool) -> str:
    """What a workload's results are kept under. With the pair they are kept apart: it is too slow for as many rounds."""
    return name + _WITH_PAIR if pair else name


def workload_of(title: str) -> str:
    """The name in `WORKLOADS`."""
    return title.removesuffix(_WITH_PAIR)


def seed_of(*what: object) -> int:
    """A seed made of names and numbers: the same for the same ones, in every process."""
    return random.Random("/".join(map(str, what))).randrange(1 << 30)


@dataclass(slots=True)
class Asked:
    """One system's way through the workloads: a goodput search starts where this system's last one ended."""

    model: Path
    rungs: dict[str, int]

    def figures(self, url: str, name: str, seed: int) -> dict[str, float]:
        """Run one workload. All systems that are given a round's `seed` are asked the same; no two workloads are."""
        workload = WORKLOADS[name]
        if not workload.search:
            result = load.run(url, self.model, workload.load, seed_of(seed, name))
            return {label: figure(result) for label, figure in workload.figures.items()}

        def keeps(rate: float) -> bool:
            return keeps_objectives(url, self.model, probe(workload.load, rate), seed_of(seed, name, rate))

        rung = best_rung(keeps, self.rungs.get(name, FIRST_RUNG))
        self.rungs[name] = max(rung, 0)
        return {"requests a second": RATES[rung] if rung >= 0 else 0.0}


def best_rung(keeps: Callable[[float], bool], guess: int) -> int:
    """The highest rung of `RATES` at which enough requests keep the objectives, sought from `guess` on; -1: none."""
    if keeps(RATES[guess]):
        while guess + 1 < len(RATES) and keeps(RATES[guess + 1]):
            guess += 1
        return guess
    while guess > 0 and not keeps(RATES[guess - 1]):
        guess -= 1
    return guess - 1


def probe(wanted: Load, rate: float) -> Load:
    """`wanted` at a rate: its requests, fewer where they would take too long to arrive, more where it were a mere burst."""
    most = max(_FEWEST, min(wanted.requests, round(rate * _SECONDS_MOST)))
    return replace(wanted, rate=rate, requests=max(most, math.ceil(rate * _SECONDS_LEAST)))


def keeps_objectives(url: str, model: Path, asked: Load, seed: int) -> bool:
    """Whether enough of the requests of a probe do; one that was refused or failed does not."""
    result = load.run(url, model, asked, seed, all_answered=False)
    return float(result["request_goodput"]) * float(result["duration"]) >= _ENOUGH * asked.requests - 1e-6
