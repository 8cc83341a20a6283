"""Serving a small model on this machine's cores: ours beside vLLM in one process and vLLM's prefill/decode pair.

All servers are up at once and asked in turn, round by round, with the same client and the same fresh seed; what idle servers
burn meanwhile is written down.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from bench import load, peers
from bench.load import Load
from bench.results import save

_RATES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)  # requests a second
_ENOUGH = 0.9  # of the requests must keep both objectives
_QUIET_S = 3.0


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
    "1024/64 c=8": Workload(Load(1024, 64, 20, 8), _SATURATED),
    "256/64 c=1": Workload(Load(256, 64, 6, 1), _ALONE),
    "1000-token prefix c=1": Workload(Load(24, 8, 6, 1, prefix=1000), _PREFIX),
    "256/64 goodput": Workload(Load(256, 64, 30, goodput=(1000, 40)), {}, search=True),
    "1024/64 goodput": Workload(Load(1024, 64, 20, goodput=(2000, 40)), {}, search=True),
}


def main(arguments: Sequence[str]) -> None:
    """Run and save."""
    parser = argparse.ArgumentParser(prog="make bench PART=serving", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--systems", nargs="+", default=["splitserve", "vllm", "pair"])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--flags", default="", help="more flags for splitserve serve")
    given = parser.parse_args(arguments)
    peers.set_up()
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    with ExitStack() as stack:
        start: dict[str, Callable[[], Any]] = {
            "splitserve": lambda: peers.splitserve(given.model, 8300, given.flags.split()),
            "vllm": lambda: peers.vllm(given.model, 8310, f"{cores[0]}-{cores[-1]}"),
            "pair": lambda: peers.vllm_pair(given.model, 8320, (cores[0], cores[-1])),
        }
        urls = {name: stack.enter_context(start[name]()) for name in given.systems}
        for url in urls.values():  # whatever is made at a first request is made before the clock runs
            load.run(url, given.model, Load(256, 16, 4, 2), random.randrange(1 << 30))
        idle = psutil.cpu_percent(_QUIET_S)
        figures = _rounds(urls, given.model, [w for w in WORKLOADS if w in given.workloads], given.rounds)
    save("serving", {"idle_cpu_percent": idle, "rounds": given.rounds, "workloads": figures})


def _rounds(urls: Mapping[str, str], model: Path, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """workload -> figure -> system -> one value a round."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in names:
        workload, rungs = WORKLOADS[name], dict.fromkeys(urls, 3)
        for number in range(rounds):
            seed, systems, first = random.randrange(1 << 30), list(urls), number % len(urls)
            for system in systems[first:] + systems[:first]:
                started = time.monotonic()
                if workload.search:
                    rungs[system] = best_rung(_keeps(urls[system], model, workload.load), max(rungs[system], 0))
                    figures = {"requests a second": _RATES[rungs[system]] if rungs[system] >= 0 else 0.0}
                else:
                    result = load.run(urls[system], model, workload.load, seed)
                    figures = {label: figure(result) for label, figure in workload.figures.items()}
                for label, value in figures.items():
                    found.setdefault(name, {}).setdefault(label, {}).setdefault(system, []).append(value)
                shown = ", ".join(f"{label} {value:.2f}" for label, value in figures.items())
                print(f"{name}, round {number + 1}, {system}: {shown} ({time.monotonic() - started:.0f} s)", flush=True)
    return found


def best_rung(keeps: Callable[[float], bool], guess: int) -> int:
    """The highest rung of `_RATES` at which enough requests keep the objectives, sought from `guess` on; -1: none."""
    if keeps(_RATES[guess]):
        while guess + 1 < len(_RATES) and keeps(_RATES[guess + 1]):
            guess += 1
        return guess
    while guess > 0 and not keeps(_RATES[guess - 1]):
        guess -= 1
    return guess - 1


def _keeps(url: str, model: Path, wanted: Load) -> Callable[[float], bool]:
    def keeps(rate: float) -> bool:
        result = load.run(url, model, replace(wanted, rate=rate), random.randrange(1 << 30))
        return float(result["request_goodput"]) >= _ENOUGH * float(result["request_throughput"])

    return keeps
