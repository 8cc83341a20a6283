"""Each part of `make bench` is started with what its script asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.parts import PARTS

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if part.script])
def test_a_script_that_needs_a_model_is_given_one(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    flag = re.search(r'add_argument\("(--)?model"', text)
    assert PARTS[name].model == (None if flag is None else f"{flag[1] or ''}model" if flag[1] else "")
