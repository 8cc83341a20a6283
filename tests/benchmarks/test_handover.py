"""What is made of the stages that answers tell of themselves."""

from __future__ import annotations

import pytest

from handover import percentile, rows_of, table

STAGES = {
    "ttft": 0.4,
    "prefill": 0.4,
    "first_gap": 0.0265,
    "handle": 0.001,
    "transfer": 0.002,
    "decode_queue": 0.0005,
    "first_step": 0.02,
    "gap_other": 0.003,
}


def test_the_hand_over_is_the_first_gap_less_decodes_first_step() -> None:
    rows = rows_of(STAGES)
    assert rows["hand-over"] == pytest.approx(1e3 * (STAGES["first_gap"] - STAGES["first_step"]))
    assert rows["bytes aside"] == pytest.approx(rows["hand-over"] - 2.0)


def test_an_answer_whose_prompt_was_read_where_it_was_answered_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no hand-over"):
        rows_of({"ttft": 0.4, "prefill": 0.4})


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], share) for share in (1, 50, 90, 100)] == [1.0, 2.0, 4.0, 4.0]


def test_the_table_has_a_row_a_stage() -> None:
    lines = table({row: [value] for row, value in rows_of(STAGES).items()})
    assert lines[2].split() == ["transfer", "2.00", "2.00"]
