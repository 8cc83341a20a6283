"""What `make bench` makes of figures: medians, ratios round by round, bars met and missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import page as pages
from bench import results
from bench.page import text
from bench.results import Spread, ratios
from bench.workloads import title


def about() -> dict[str, Any]:
    machine = {"cpu": "a CPU", "cores": 2, "instructions": ["avx2"], "memory_gib": 8, "python": "3.11.7"}
    return {"command": "make bench PART=x", "machine": machine, "when": "2026-01-01", "commit": "abc"}


def served(**values: list[float]) -> dict[str, Any]:
    idle = {system: [20.0, 70.0, 71.0] for system in values}
    entry = {**about(), "rounds": 3, "idle_percent": idle, "figures": {"requests a second": values}}
    return {"workloads": {"256/64 c=16": entry}}


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


def test_each_workload_says_how_it_was_made_and_what_each_system_burned_idle() -> None:
    page = text({"serving": served(splitserve=[1.0, 1.0, 1.0], vllm=[1.0, 1.0, 1.0])})
    assert (
        "3 rounds. Idle, of one core: splitserve 70 %, vLLM 70 %. `make bench PART=x`, 2026-01-01, commit abc" in page
    )


def test_a_workload_that_only_a_peer_was_asked_has_a_table_all_the_same() -> None:
    assert "| | vLLM | ratio" in text({"serving": served(vllm=[1.0, 1.0, 1.0])})


def test_a_peer_that_kept_no_rate_is_taken_for_one_that_kept_the_lowest() -> None:
    (entry,) = served(splitserve=[1.0, 1.0, 1.0], vllm=[0.0, 1.0, 0.0])["workloads"].values()
    page = text({"serving": {"workloads": {"256/64 goodput": entry}}})
    assert "vLLM at least 4.00 (1.00 to 4.00), bar at least 1.7: met" in page


def test_a_peer_that_answered_nothing_where_no_rate_was_sought_gets_no_ratio() -> None:
    page = text({"serving": served(splitserve=[1.0, 1.0, 1.0], vllm=[0.0, 0.0, 0.0])})
    assert "bar at" not in page


def test_results_with_the_pair_have_a_table_of_their_own_and_the_same_bars() -> None:
    alone = served(splitserve=[3.0], vllm=[1.0])["workloads"]
    both = {title(name, pair=True): entry for name, entry in served(splitserve=[3.0], pair=[0.5])["workloads"].items()}
    page = text({"serving": {"workloads": alone | both}})
    assert "### 256/64 c=16\n" in page
    assert "### 256/64 c=16, beside its pair too\n" in page
    assert "vLLM's pair 6.00 (6.00 to 6.00), bar at least 4.5: met" in page


def test_what_a_script_printed_is_shown_as_printed() -> None:
    assert "```\na  b\n```" in text({"fleet_page": {**about(), "printed": "a  b\n"}})


def test_where_nothing_was_measured_the_page_stays_as_it_came(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("as it came")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(pages, "PAGE", page)
    pages.write()
    assert page.read_text() == "as it came"
    results.write("fleet_page", {**about(), "printed": "a  b"})
    pages.write()
    assert "a  b" in page.read_text()


def test_what_was_not_measured_here_stays_as_it_came_and_what_was_takes_its_place() -> None:
    one = served(splitserve=[1.0], vllm=[1.0])["workloads"]["256/64 c=16"]
    before = text(
        {
            "serving": {"workloads": {"256/64 c=16": one, "1024/64 c=8": one}},
            "router": {**about(), "printed": "## not a heading\nold router"},
            "fleet_page": {**about(), "printed": "old fleet"},
        }
    )
    after = text(
        {"serving": served(splitserve=[9.0], vllm=[1.0]), "fleet_page": {**about(), "printed": "new fleet"}}, before
    )
    assert "new fleet" in after
    assert "old fleet" not in after
    assert "```\n## not a heading\nold router\n```" in after
    changed, kept = after.split("### 1024/64 c=8")
    old = "| 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |"
    assert "| 9.00 (9.00 to 9.00) | 1.00 (1.00 to 1.00) |" in changed
    assert old not in changed
    assert old in kept
    assert text({}, after) == after
