"""What the grid says of a cell."""

from __future__ import annotations

from split_grid import table


def test_a_cell_names_the_better_way_and_whether_auto_kept_the_bound() -> None:
    kept = {"always": [100.0, 110.0], "never": [200.0, 220.0], "auto": [104.0, 112.0]}
    missed = {"always": [100.0, 100.0], "never": [80.0, 80.0], "auto": [100.0, 100.0]}
    *_, one, other = table({(256, 16): kept, (32, 1): missed}, 32).splitlines()
    assert "2.00  1.03" in one
    assert "(always)" in one
    assert "bound" not in one
    assert "0.80  1.25" in other
    assert other.endswith("(never), over the bound of 1.05")
