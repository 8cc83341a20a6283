"""What the systems of a round are asked, and how the highest rate is sought."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench import load
from bench.load import Load
from bench.workloads import RATES, WORKLOADS, Asked, best_rung, keeps_objectives, probe

MODEL = Path("model")


@dataclass
class Generator:
    """Answers as a server would that keeps the objectives up to `limit` requests a second."""

    limit: float
    seeds: list[tuple[float | None, int]] = field(default_factory=list[tuple[float | None, int]])

    def run(self, url: str, model: Path, load: Load, seed: int, *, all_answered: bool = True) -> dict[str, Any]:
        self.seeds.append((load.rate, seed))
        kept = load.requests if (load.rate or 0) <= self.limit else load.requests // 2
        times = {"mean_ttft_ms": 1, "mean_tpot_ms": 1, "p99_itl_ms": 1, "request_throughput": 1}
        return {**times, "duration": 10.0, "request_goodput": kept / 10.0}


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    made = Generator(limit=1.5)
    monkeypatch.setattr(load, "run", made.run)
    return made


@pytest.mark.parametrize(("limit", "guess", "found"), [(1.0, 3, 4), (9.0, 0, 10), (0.3, 5, 0), (0.1, 2, -1)])
def test_the_best_rung_is_found_from_any_guess(limit: float, guess: int, found: int) -> None:
    assert best_rung(lambda rate: rate <= limit, guess) == found


def test_systems_of_one_round_are_asked_the_same_at_every_rate(generator: Generator) -> None:
    for rungs in ({}, {"256/64 goodput": 7}):
        assert Asked(MODEL, rungs).figures("url", "256/64 goodput", seed=5) == {"requests a second": 1.4}
    seeds = dict(generator.seeds)
    assert len(generator.seeds) > len(seeds), "the two searches met at some rates"
    assert set(generator.seeds) == set(seeds.items())
    assert len(set(seeds.values())) == len(seeds), "no two rates share prompts: the second would find them cached"


def test_a_search_starts_where_the_systems_last_one_ended(generator: Generator) -> None:
    asked = Asked(MODEL, {})
    asked.figures("url", "256/64 goodput", seed=5)
    generator.seeds.clear()
    asked.figures("url", "256/64 goodput", seed=6)
    assert [rate for rate, _ in generator.seeds] == [1.4, 2.0]


def test_no_two_workloads_or_rounds_share_prompts(generator: Generator) -> None:
    for seed in (5, 6):
        for name in ("256/64 c=16", "1024/64 c=8"):
            Asked(MODEL, {}).figures("url", name, seed)
    assert len({seed for _, seed in generator.seeds}) == 4


@pytest.mark.parametrize("rate", RATES)
def test_a_probe_lasts_neither_long_nor_only_a_moment(rate: float) -> None:
    for workload in WORKLOADS.values():
        asked = probe(workload.load, rate)
        assert asked.rate == rate
        assert 10 <= asked.requests / rate <= 80
        assert asked.requests >= 20


def test_a_request_that_failed_did_not_keep_its_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> dict[str, Any]:
        return {"completed": 17, "duration": 10.0, "request_goodput": 1.7, "request_throughput": 1.7}

    monkeypatch.setattr(load, "run", run)
    assert not keeps_objectives("url", MODEL, Load(256, 64, 20, rate=1.0), seed=1)
