"""What a user installs: a wheel and an sdist, built offline, that work from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ROOTS = (ROOT / "services", ROOT / "shared")
WITHOUT_EXTRAS = {"splitserve.engine.cuda.triton_kernels"}  # Triton comes with torch's builds for GPUs
IMPORT_ALL = """
import importlib, json, sys
print(json.dumps([importlib.import_module(name).__file__ for name in json.loads(sys.stdin.read())]))
"""


def sources() -> set[str]:
    """Files of the package, relative to its two roots, that the repository tracks."""
    listed = subprocess.run(["git", "ls-files", *map(str, ROOTS)], cwd=ROOT, capture_output=True, text=True, check=True)
    return {path.partition("/")[2] for path in listed.stdout.splitlines() if (ROOT / path).exists()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, of a build without isolation: whatever it needs is in the `dev` extra."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a venv of its own with the wheel in it; its dependencies are those of the venv that runs the tests."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # a path line, not `site.addsitedir`: .pth files behind it, as of an editable install of this very project, are not read
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def run(command: list[str], folder: Path, given: str = "") -> str:
    """What it says, from a folder that is not ours and without our paths."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPLITSERVE_"))}
    done = subprocess.run(
        command, cwd=folder, env=env, input=given, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed >= sources()
    assert {name.partition("/")[0] for name in packed} == {"splitserve"}


def test_the_sdist_has_what_builds_the_wheel_again(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2].partition("/")[2] for name in archive.getnames()}
        top = {name.partition("/")[2] for name in archive.getnames()}
    assert packed >= sources()
    assert top >= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}


def test_the_installed_command_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    splitserve = str(installed / "splitserve")
    assert "serve" in run([splitserve, "--help"], tmp_path)
    assert run([splitserve, "--version"], tmp_path).strip()
    assert "--max-model-len" in run([splitserve, "serve", "--help"], tmp_path)


def test_every_module_of_the_installed_wheel_can_be_imported(installed: Path, tmp_path: Path) -> None:
    names = sorted(
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in sources()
        if path.endswith(".py") and not path.endswith("__main__.py")
    )
    assert len(names) > 100
    asked = json.dumps([name for name in names if name not in WITHOUT_EXTRAS])
    files = json.loads(run([str(installed / "python"), "-c", IMPORT_ALL], tmp_path, asked))
    site = next((installed.parent / "lib").glob("python*")) / "site-packages"
    assert [file for file in files if not Path(file).is_relative_to(site)] == []
