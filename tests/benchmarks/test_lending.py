"""What is said of lending."""

from __future__ import annotations

import pytest

from lending import BARRED, FIGURES, table


@pytest.mark.parametrize(("lent", "verdict", "met"), [(29.0, "0.97", True), (36.0, "1.20", False)])
def test_the_bar_is_for_the_ratio_of_the_last_hundredth_of_the_gaps(lent: float, verdict: str, met: bool) -> None:
    found = {row: {"lent": [20.0], "kept": [10.0]} for row in FIGURES} | {BARRED: {"lent": [lent], "kept": [30.0]}}
    lines, kept_bar = table(found)
    (line,) = [line for line in lines if "bar" in line]
    assert line.startswith("arrivals: p99")
    assert verdict in line
    assert line.endswith("met" if met else "missed")
    assert kept_bar is met
    assert len(lines) == 1 + len(FIGURES)
