"""What the engine's tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from splitserve.engine.native import library
from splitserve.model.embedded import default_cache


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The cache that holds the compiled kernels, built as a worker builds them, and loaded."""
    why_not = library.refusal()
    if why_not is not None:
        pytest.skip(why_not)
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler here")
    cache = default_cache()
    library.load(library.build(cache))
    return cache
