"""What `make bench` makes of figures: medians, ratios round by round, bars met and missed."""

from __future__ import annotations

from typing import Any

import pytest

from bench.page import text
from bench.results import Spread, ratios
from bench.serving import best_rung


def kept(figures: dict[str, Any]) -> dict[str, Any]:
    machine = {"cpu": "a CPU", "cores": 2, "instructions": ["avx2"], "memory_gib": 8, "python": "3.11.7"}
    return {
        "command": "make bench PART=x",
        "machine": machine,
        "when": "2026-01-01",
        "commit": "abc",
        "figures": figures,
    }


def served(**values: list[float]) -> dict[str, Any]:
    return kept({"idle_cpu_percent": 2.0, "rounds": 3, "workloads": {"256/64 c=16": {"requests a second": values}}})


def test_a_spread_is_median_least_and_greatest() -> None:
    assert str(Spread.of([3.0, 1.0, 2.0])) == "2.00 (1.00 to 3.00)"
    with pytest.raises(ValueError, match="no repeats"):
        Spread.of([])


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([2.0, 30.0], [1.0, 10.0]).median == 2.5
    assert ratios([2.0, 30.0], [0.0, 10.0]).n == 1


@pytest.mark.parametrize(("ours", "said"), [([3.0, 3.0, 3.0], "met"), ([1.4, 1.4, 1.4], "**missed**")])
def test_the_page_says_beside_a_ratio_whether_it_meets_its_bar(ours: list[float], said: str) -> None:
    page = text({"serving": served(splitserve=ours, vllm=[1.0, 1.0, 1.0])})
    assert f"bar at least 1.5: {said}" in page
    assert "`make bench PART=x`" in page


def test_a_peer_that_kept_no_rate_gets_no_ratio() -> None:
    page = text({"serving": served(splitserve=[1.0, 1.0, 1.0], vllm=[0.0, 0.0, 0.0])})
    assert "bar at" not in page


def test_what_a_script_printed_is_shown_as_printed() -> None:
    assert "```\na  b\n```" in text({"fleet_page": kept({"printed": "a  b\n"})})


@pytest.mark.parametrize(("limit", "guess", "found"), [(1.0, 3, 4), (9.0, 0, 10), (0.3, 5, 0), (0.1, 2, -1)])
def test_the_best_rung_is_found_from_any_guess(limit: float, guess: int, found: int) -> None:
    assert best_rung(lambda rate: rate <= limit, guess) == found
