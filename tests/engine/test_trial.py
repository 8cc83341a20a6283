"""Which format is faster is tried once a machine, and all its workers take the same."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from splitserve.engine.trial import bfloat16_is_faster, seconds_by_format


@pytest.mark.parametrize(("bfloat16", "expected"), [(1.0, True), (2.0, False), (3.0, False)])
def test_the_faster_format_is_taken(tmp_path: Path, bfloat16: float, expected: bool) -> None:
    assert bfloat16_is_faster(tmp_path, lambda: {"bfloat16": bfloat16, "float32": 2.0}) is expected


def test_workers_that_start_together_take_what_one_of_them_found(tmp_path: Path) -> None:
    found = iter([{"bfloat16": 2.0, "float32": 1.0}, *[{"bfloat16": 1.0, "float32": 2.0}] * 7])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: bfloat16_is_faster(tmp_path, lambda: next(found)), range(8)))
    assert answers == [False] * 8
    assert next(found)["bfloat16"] == 1.0


def test_a_trial_multiplies_in_both_formats_and_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    times = seconds_by_format()
    assert sorted(times) == ["bfloat16", "float32"]
    assert min(times.values()) > 0
    assert torch.equal(torch.rand(1), expected)


def test_what_was_found_is_kept_for_the_next_start(tmp_path: Path) -> None:
    bfloat16_is_faster(tmp_path, lambda: {"bfloat16": 1.0, "float32": 2.0})
    kept = [json.loads(path.read_text()) for path in (tmp_path / "trials").glob("*.json")]
    assert kept == [{"bfloat16": 1.0, "float32": 2.0}]


def test_what_a_power_cut_left_of_it_is_tried_again(tmp_path: Path) -> None:
    bfloat16_is_faster(tmp_path, lambda: {"bfloat16": 1.0, "float32": 2.0})
    for path in (tmp_path / "trials").glob("*.json"):
        path.write_text("")
    assert not bfloat16_is_faster(tmp_path, lambda: {"bfloat16": 3.0, "float32": 2.0})
    assert not bfloat16_is_faster(tmp_path, lambda: pytest.fail("tried"))


def test_where_nothing_can_be_kept_nothing_is_tried_and_float32_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "not-a-folder"
    file.write_text("")
    with caplog.at_level(logging.WARNING, "splitserve.engine"):
        assert bfloat16_is_faster(file, lambda: pytest.fail("tried")) is False
    assert "float32 is taken" in caplog.text
