"""The kernels' AMX path where the CPU has no AMX: all tests of the kernels again, over tiles that are emulated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.amx import EMULATED_AMX

HERE = Path(__file__).parent
TESTS = [HERE / "test_kernels.py", HERE / "test_fused.py"]


@pytest.mark.model
@pytest.mark.timeout(900)  # the child's own is shorter
@pytest.mark.skipif(EMULATED_AMX in os.environ, reason="this run is of emulated tiles already")
def test_all_that_the_kernels_promise_holds_for_their_amx_tiles(kernels: Path, tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "model", *map(str, TESTS)]
    given = {**os.environ, EMULATED_AMX: str(tmp_path)}
    ran = subprocess.run(asked, env=given, capture_output=True, text=True, timeout=840, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "no AMX" not in ran.stdout
    assert list(tmp_path.rglob("kernels-*.so")), "nothing was built with the tiles"
