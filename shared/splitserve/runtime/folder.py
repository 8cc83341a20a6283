"""The private folder of one process: of `splitserve serve` addresses with passwords, server configurations and sockets, of
a prefill worker that was started alone its socket.

It is 0700, and locked while its owner lives (it gets its name once the lock is held). The next start removes what a killed
one left behind; the processes of a killed `serve` are gone already (`splitserve.tether`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_LOCK = "lock"


@contextmanager
def run_folder(base: Path | None = None) -> Generator[Path, None, None]:
    """A fresh folder, removed at the end. `base` is `XDG_RUNTIME_DIR`, else the folder for temporary files."""
    parent = base or _base()
    prefix = f"splitserve-{os.getuid()}-"
    for leftover in parent.glob(f"{prefix}*"):
        _remove_if_left(leftover)
    fresh = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
    folder = parent / fresh.name.removeprefix(".")
    with (fresh / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh.rename(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _base() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime) if runtime and os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())


def _remove_if_left(folder: Path) -> None:
    try:
        with (folder / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # its owner lives, or has just removed it
