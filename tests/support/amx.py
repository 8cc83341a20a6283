"""The kernels' library with AMX tiles that are emulated: its AMX path runs on any CPU that the kernels run on."""

from __future__ import annotations

import shutil
from pathlib import Path

EMULATED_AMX = "SPLITSERVE_TEST_EMULATED_AMX"  # a folder to build it in; set for a run of the kernels' tests
_TILES = Path(__file__).with_name("emulated_amx.h")


def compiler_with_tiles(folder: Path) -> Path:
    """A compiler that finds the tiles before anything else. FileNotFoundError without one."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise FileNotFoundError("no C++ compiler was found (g++, clang++)")
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {found} -include {_TILES} "$@"\n')
    compiler.chmod(0o755)
    return compiler
