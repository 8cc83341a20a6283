"""The last minute's counts and medians."""

from __future__ import annotations

import random
from statistics import median

import pytest

from splitserve.router.status.rolling import KEPT_S, Durations, Rolling


def test_the_second_under_way_is_not_read_and_what_is_too_old_is_forgotten():
    rolling: Rolling[str] = Rolling()
    rolling.add("a", 100.9)
    assert rolling.counts(100.99) == {}
    assert rolling.counts(101.0) == {"a": 1}
    rolling.add("a", 105.0, 4)
    assert rolling.counts(106.0, 5) == {"a": 4}
    assert rolling.counts(106.0, 6) == {"a": 5}
    assert rolling.counts(100.0 + KEPT_S) == {"a": 5}
    assert rolling.counts(101.0 + KEPT_S) == {"a": 4}


def test_it_keeps_a_minute_however_much_comes():
    rolling: Rolling[int] = Rolling()
    for second in range(1000):
        rolling.add(second % 3, float(second))
    assert rolling.counts(1000.0).total() == KEPT_S


@pytest.mark.parametrize("scale", [1e-5, 0.02, 3.0, 400.0])
def test_a_median_is_right_within_a_few_percent(scale: float):
    chance = random.Random(7)
    values = [scale * chance.lognormvariate(0, 0.7) for _ in range(999)]
    durations = Durations()
    for value in values:
        durations.add(value, 5.0)
    assert durations.median(6.0) == pytest.approx(median(values), rel=0.04)


def test_without_durations_there_is_no_median_and_none_is_too_short():
    durations = Durations()
    assert durations.median(6.0) is None
    durations.add(0.0, 6.0)
    assert durations.median(7.0) == pytest.approx(1e-6, rel=0.04)
