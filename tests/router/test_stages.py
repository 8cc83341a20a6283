"""Where the time went: parts, what is left, and that they sum to the whole."""

from __future__ import annotations

import pytest

from splitserve.router.stages import GAP_PARTS, TTFT_PARTS, Stages, breakdown, gap_breakdown


def split_request() -> Stages:
    """Tokenised for 5 ms, reserved in 10, read elsewhere in 50 of which 42 there, second token 30 ms later."""
    stages = Stages(100.0)
    stages.tokenised(0.005)
    stages.asked(100.0)
    stages.reserved(100.010)
    stages.prefill_asked(100.010)
    stages.prefill_told(100.060, 0.042)
    stages.prefilled(0.002, 0.040)
    stages.tokens(100.060, 1)
    stages.loaded(0.001, 0.004)
    stages.stepped(0.003, 0.020)
    stages.tokens(100.090, 2)
    return stages


def test_the_ways_over_the_bus_are_what_the_worker_did_not_spend() -> None:
    seconds = split_request().seconds(100.1)
    assert seconds["prefill_bus"] == pytest.approx(0.008)
    assert seconds["other"] == pytest.approx(0, abs=1e-9)
    assert seconds["ttft"] == pytest.approx(0.065)
    assert seconds["e2e"] == pytest.approx(0.105)
    assert (seconds["place"], seconds["tokenise"]) == (pytest.approx(0, abs=1e-9), 0.005)


def test_the_gap_is_the_sum_of_its_parts() -> None:
    seconds = split_request().seconds(100.1)
    assert seconds["first_gap"] == pytest.approx(0.03)
    assert seconds["gap_other"] == pytest.approx(0.002)
    assert sum(gap_breakdown(seconds).values()) == pytest.approx(0.03)


def test_a_second_reading_of_the_prompt_after_the_first_token_changes_no_part() -> None:
    stages = Stages(0.0)
    stages.asked(0.0)
    stages.reserved(0.01)
    stages.prefilled(0.0, 0.02)  # read by the decode worker itself
    stages.tokens(0.03, 1)
    stages.prefill_asked(5.0)
    stages.prefill_told(6.0, 0.1)
    assert "prefill_bus" not in stages.seconds(7.0)
    assert stages.seconds(7.0)["ttft"] == pytest.approx(0.03)


def test_a_request_sums_to_the_time_until_its_first_token_and_its_text() -> None:
    found = breakdown([split_request().seconds(100.1)], tokenise_s=0.005, detokenise_s=0.001, first_token_s=0.068)
    assert set(found) == {"tokenise", *TTFT_PARTS, "other", "detokenise"}
    assert sum(found.values()) == pytest.approx(0.069)
    assert found["other"] == pytest.approx(0.003)


def test_of_several_prompts_the_one_counts_whose_token_came_first() -> None:
    slow = {"ttft": 9.0, "prefill": 8.0}
    found = breakdown([slow, {"ttft": 1.0, "prefill": 0.5}], tokenise_s=0, detokenise_s=0, first_token_s=1.0)
    assert (found["prefill"], found["other"]) == (0.5, 0.5)


@pytest.mark.parametrize("stages", [{}, {"first_gap": 0.1, "gap_other": 0.1}, {"transfer": 0.1}])
def test_a_prompt_that_was_not_moved_has_no_gap_to_explain(stages: dict[str, float]) -> None:
    assert gap_breakdown(stages) == {}


def test_a_gap_that_was_moved_has_every_part() -> None:
    assert set(gap_breakdown({"first_gap": 0.1, "transfer": 0.1, "gap_other": 0.0})) == {*GAP_PARTS, "gap_other"}


def test_a_worker_that_began_to_read_before_we_heard_that_it_took_the_request_is_counted_once() -> None:
    stages = Stages(0.0)
    stages.asked(0.0)
    stages.reserved(0.004)  # its answer was 3 ms on its way, while it read
    stages.prefilled(0.001, 0.010)
    stages.tokens(0.013, 1)
    seconds = stages.seconds(0.02)
    assert seconds["reserve"] == pytest.approx(0.002)
    assert sum(seconds[part] for part in ("place", "reserve", "prefill_queue", "prefill", "other")) == pytest.approx(
        0.013
    )
