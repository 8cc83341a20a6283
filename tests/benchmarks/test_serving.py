"""Rounds of `make bench PART=serving`: one system at a time, and what is kept of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import load, peers, results, serving
from bench.load import Load
from bench.peers import Served
from bench.workloads import title

NAME = "256/64 c=1"
THREE = ("splitserve", "vllm", "pair")


class Machine:
    """Stands in for servers and generator; `log` says in which order what happened."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.seeds: dict[str, list[int]] = {}
        self.fail_at = ""

    @contextmanager
    def start(self, system: str) -> Generator[Served]:
        self.log.append(f"start {system}")
        yield Served(system, (0,))
        self.log.append(f"end {system}")

    def run(self, url: str, model: Path, load: Load, seed: int, *, all_answered: bool = True) -> dict[str, Any]:
        self.seeds.setdefault(url, []).append(seed)
        if url == self.fail_at and len(self.seeds[url]) > 2:
            raise RuntimeError("it failed")
        return {"median_ttft_ms": 10.0 if url == "splitserve" else 20.0, "median_tpot_ms": 1.0}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine()
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(peers, "set_up", lambda: None)
    monkeypatch.setattr(serving, "_compile_kernels", lambda: None)
    monkeypatch.setattr(serving, "busy_percent", lambda *_: 70.0)
    monkeypatch.setattr(load, "run", made.run)
    monkeypatch.setattr(peers, "splitserve", lambda *_: made.start("splitserve"))
    monkeypatch.setattr(peers, "vllm", lambda *_: made.start("vllm"))
    monkeypatch.setattr(peers, "vllm_pair", lambda *_: made.start("pair"))
    return made


def measure(*arguments: str) -> dict[str, Any]:
    serving.main(["--model", "/a/folder", *arguments])
    return kept()


def kept() -> dict[str, Any]:
    return (results.load("serving") or {})["workloads"]


def starts(log: Sequence[str]) -> list[str]:
    return [line.removeprefix("start ") for line in log if line.startswith("start")]


def test_a_system_is_gone_before_the_next_starts_and_the_order_rotates(machine: Machine) -> None:
    measure("--rounds", "2", "--systems", *THREE, "--workloads", NAME)
    for start, end in zip(machine.log[::2], machine.log[1::2], strict=True):
        assert start.removeprefix("start ") == end.removeprefix("end ")
    assert starts(machine.log) == ["splitserve", "vllm", "pair", "vllm", "pair", "splitserve"]


def test_all_systems_of_a_round_are_given_the_same_seeds_and_each_round_others(machine: Machine) -> None:
    measure("--rounds", "2", "--systems", *THREE, "--workloads", NAME)
    assert machine.seeds["splitserve"] == machine.seeds["vllm"] == machine.seeds["pair"]
    assert len(set(machine.seeds["vllm"])) == 4, "the warm-up and the workload, twice"


def test_a_run_cut_short_leaves_the_rounds_it_had(machine: Machine) -> None:
    machine.fail_at = "pair"  # in the second round, when vLLM was asked already
    with pytest.raises(RuntimeError, match="it failed"):
        measure("--rounds", "3", "--systems", *THREE, "--workloads", NAME)
    entry = kept()[title(NAME, pair=True)]
    assert entry["rounds"] == 1
    assert entry["figures"]["TTFT, ms"] == {"splitserve": [10.0], "vllm": [20.0], "pair": [20.0]}
    assert entry["idle_percent"] == {"splitserve": [70.0], "vllm": [70.0], "pair": [70.0]}


def test_a_run_with_other_workloads_leaves_those_of_before(machine: Machine) -> None:
    measure("--rounds", "2", "--workloads", NAME)
    results.write("serving", {"workloads": {NAME: kept()[NAME], "256/64 c=16": {"rounds": 5}}})
    entries = measure("--rounds", "1", "--systems", "splitserve", "--flags=--split always", "--workloads", NAME)
    assert list(entries) == ["256/64 c=16", NAME]
    assert entries["256/64 c=16"] == {"rounds": 5}
    assert entries[NAME]["rounds"] == 1


def test_a_run_with_the_slow_pair_leaves_those_without_it(machine: Machine) -> None:
    measure("--rounds", "2", "--workloads", NAME)
    entries = measure("--rounds", "1", "--systems", *THREE, "--workloads", NAME)
    assert {name: entry["rounds"] for name, entry in entries.items()} == {NAME: 2, title(NAME, pair=True): 1}


def test_a_workload_says_the_command_that_measures_it_alone(machine: Machine) -> None:
    entries = measure("--systems", "splitserve", "--flags=--split always", "--workloads", NAME)
    flags = f'--systems splitserve "--flags=--split always" --workloads "{NAME}"'
    assert entries[NAME]["command"] == f"make bench PART=serving ARGS='{flags}'"


def test_a_command_does_not_tell_where_folders_lie() -> None:
    told = results.command("router", ["--model", "/var/somewhere", "--cache=/home/me", "--rounds", "3"])
    assert told == "make bench PART=router ARGS='--model FOLDER --cache=FOLDER --rounds 3'"
