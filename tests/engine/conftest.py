"""What the engine's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitserve.engine.native import library
from splitserve.model.embedded import default_cache
from support.amx import EMULATED_AMX, compiler_with_tiles


@pytest.fixture(scope="session")
def kernels() -> Iterator[Path]:
    """The cache that holds the compiled kernels, built as a worker builds them, and loaded."""
    why_not = library.refusal()
    if why_not is not None:
        pytest.skip(why_not)
    compiler = library.found_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = os.environ.get(EMULATED_AMX)
    cache = Path(folder) if folder else default_cache()
    with pytest.MonkeyPatch.context() as patched:
        if folder:
            patched.setenv("CXX", str(compiler_with_tiles(compiler, cache)))
        library.load(library.build(cache))
    with pytest.MonkeyPatch.context() as patched:
        if folder:
            for user in ("splitserve.engine.fused", "splitserve.engine.attention.native_backend"):
                patched.setattr(f"{user}.amx_allowed", lambda: True)
        yield cache
