"""The kernels' library with AMX tiles that are emulated: its AMX path runs on any CPU that the kernels run on."""

from __future__ import annotations

from pathlib import Path

EMULATED_AMX = "SPLITSERVE_TEST_EMULATED_AMX"  # a folder to build it in; set for a run of the kernels' tests
_TILES = Path(__file__).with_name("emulated_amx.h")


def compiler_with_tiles(compiler: str, folder: Path) -> Path:
    """This compiler, finding the tiles before anything else."""
    made = folder / "c++"
    made.write_text(f'#!/bin/sh\nexec {compiler} -include {_TILES} "$@"\n')
    made.chmod(0o755)
    return made
