"""Serving a small model on this machine's cores: ours beside vLLM in one process, vLLM's prefill/decode pair and llama.cpp.

One system is up at a time and has all cores: idle servers of another would burn some. In a round each is started, warmed up,
asked all workloads with the round's seed, and ended, in an order that rotates. What a round found is kept as soon as it is over,
workload by workload beside those of earlier runs.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import llama, load, peers, results
from bench.peers import Served
from bench.processes import busy_percent
from bench.results import About
from bench.workloads import WORKLOADS, Asked, seed_of, title
from splitserve.config import ModelSettings
from splitserve.engine.native import library
from splitserve.errors import DependencyMissing
from splitserve.model.resolve import cache_folder

SYSTEMS = ("splitserve", "vllm", "pair", "llama")
# the pair may need ten minutes a run; llama.cpp is for one stream, and a quarter of an hour to build
_USUAL = SYSTEMS[:2]
_IDLE_S = 3.0
_ROUNDS = 5

Start = Callable[[], AbstractContextManager[Served]]


@dataclass(slots=True)
class Found:
    """Of one workload: figure -> system -> a value a round, and what each system burned idle, in per cent of a core."""

    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict[str, dict[str, list[float]]])
    idle: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def add(self, system: str, figures: Mapping[str, float], idle: float) -> None:
        for label, value in figures.items():
            self.figures.setdefault(label, {}).setdefault(system, []).append(value)
        self.idle.setdefault(system, []).append(idle)


def main(arguments: Sequence[str]) -> None:
    """Run, and save after every round."""
    given = _parser().parse_args(arguments)
    peers.set_up()
    if "llama" in given.systems:
        llama.set_up()
    _compile_kernels()
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    starts: Mapping[str, Start] = {
        "splitserve": lambda: peers.splitserve(given.model, 8300, given.flags.split()),
        "vllm": lambda: peers.vllm(given.model, 8310, f"{cores[0]}-{cores[-1]}"),
        "llama": lambda: llama.llama(8340, len(cores)),
        "pair": lambda: peers.vllm_pair(given.model, 8320, (cores[0], cores[-1])),
    }
    starts = {system: starts[system] for system in SYSTEMS if system in given.systems}
    names = [name for name in WORKLOADS if name in given.workloads]
    kept_as = {name: title(name, pair="pair" in starts) for name in names}
    abouts = {name: About.now(results.command("serving", _arguments(given, name))) for name in names}
    found = {name: Found() for name in names}
    asked = {system: Asked(given.model, {}) for system in starts}
    for number in range(given.rounds):
        for system, (figures, idle) in _round(number, starts, asked, names).items():
            for name in names:
                found[name].add(system, figures[name], idle)
        keep({kept_as[name]: entry(abouts[name], number + 1, found[name]) for name in names})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench PART=serving", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(_USUAL))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--flags", default="", help="more flags for splitserve serve")
    return parser


def _arguments(given: argparse.Namespace, name: str) -> list[str]:
    """What measures one workload again."""
    arguments = [] if given.rounds == _ROUNDS else ["--rounds", str(given.rounds)]
    if set(given.systems) != set(_USUAL):
        arguments += ["--systems", *given.systems]
    if given.flags:
        arguments += [f"--flags={given.flags}"]
    return [*arguments, "--workloads", name]


def _compile_kernels() -> None:
    """As a first start does in the background: no round's clock shall run meanwhile."""
    try:
        library.build(cache_folder(ModelSettings()))
    except DependencyMissing as error:
        print(f"our kernels cannot be compiled here, torch serves: {error.message}", flush=True)


def _round(
    number: int, starts: Mapping[str, Start], asked: Mapping[str, Asked], names: Sequence[str]
) -> dict[str, tuple[dict[str, dict[str, float]], float]]:
    """system -> (workload -> figures, idle CPU). Each is gone before the next starts."""
    seed, systems = random.randrange(1 << 30), list(starts)
    first = number % len(systems)
    found: dict[str, tuple[dict[str, dict[str, float]], float]] = {}
    for system in systems[first:] + systems[:first]:
        began = time.monotonic()
        with starts[system]() as served:
            load.run(served.url, asked[system].model, load.WARM_UP, seed_of(seed, "warm-up"))
            idle = busy_percent(served.roots, _IDLE_S)
            took = time.monotonic() - began
            print(f"round {number + 1}, {system}: up and warm in {took:.0f} s, idle {idle:.0f} % of a core", flush=True)
            figures: dict[str, dict[str, float]] = {}
            for name in names:
                began = time.monotonic()
                figures[name] = asked[system].figures(served.url, name, seed)
                shown = ", ".join(f"{label} {value:.2f}" for label, value in figures[name].items())
                print(f"{name}, round {number + 1}, {system}: {shown} ({time.monotonic() - began:.0f} s)", flush=True)
            found[system] = figures, idle
    return found


def entry(about: About, rounds: int, found: Found) -> dict[str, Any]:
    """What is kept of one workload."""
    return {**about.fields(), "rounds": rounds, "idle_percent": found.idle, "figures": found.figures}


def keep(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Beside what was kept under other titles, in the workloads' order; an earlier run of the same ones gives way."""
    kept = (results.load("serving") or {"workloads": {}})["workloads"] | entries
    titles = [title(name, pair=pair) for name in WORKLOADS for pair in (False, True)]
    results.write("serving", {"workloads": {name: kept[name] for name in titles if name in kept}})
