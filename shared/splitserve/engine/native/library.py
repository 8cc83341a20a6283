"""The kernels' library: compiled once on the user's machine, kept in the user's cache, loaded from there ever after.

No wheel of ours is tied to a CPU or a torch build: what is cached is named by a digest of source, flags and torch version.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from splitserve.errors import DependencyMissing
from splitserve.model.lock import locked
from splitserve.tether import tethered

_SOURCES = (
    "library.cpp",
    "layer.h",
    "attention.h",
    "packing.h",
    "decode.h",
    "ahead.h",
    "paged.h",
    "gemm.h",
    "lanes.h",
)  # the first is compiled
_COMPILE_TIMEOUT_S = 900.0
_ASIDE = "building-"
_ISA = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "avx2", "fma")
_CAPABILITIES = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")  # torch's names of them


def refusal() -> str | None:
    """None where the kernels can run, else one clause saying why not. What compiling needs is looked for by `build`."""
    if sys.platform != "linux":
        return "they are built on Linux only"
    offered = torch.cpu.get_capabilities()
    missing = [name for name in _CAPABILITIES if not offered.get(name)]
    if missing:
        return f"this CPU lacks {', '.join(missing)}"
    return None


def library_path(cache: Path) -> Path:
    """Where the built library is kept under `cache`."""
    sources = [(Path(__file__).parent / name).read_bytes() for name in _SOURCES]
    named = hashlib.sha256(b"\0".join([*sources, " ".join(_flags()).encode(), torch.__version__.encode()]))
    return cache / "kernels" / f"kernels-{named.hexdigest()[:16]}.so"


def build(cache: Path) -> Path:
    """Compile unless it is there; other processes wait for the one that compiles. Blocks for seconds to minutes.

    DependencyMissing without a compiler, when it fails, or when another process holds the lock for longer than it may take.
    """
    target = library_path(cache)
    if target.exists():
        return target
    compiler = found_compiler()
    if compiler is None:
        raise DependencyMissing("no C++ compiler was found (g++, clang++ or $CXX)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock"), _COMPILE_TIMEOUT_S):
            if not target.exists():
                _compile(compiler, target)
    except OSError as error:
        raise DependencyMissing(f"{target.parent}: {error.strerror or error}") from error
    return target


def found_compiler() -> str | None:
    """What `build` compiles with."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def load(path: Path) -> None:
    """Make `torch.ops.splitserve.paged_attention` callable. DependencyMissing when the library does not load."""
    if hasattr(torch.ops.splitserve, "paged_attention"):
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise DependencyMissing(f"{path} does not load: {str(error).splitlines()[0]}") from error


def amx_allowed() -> bool:
    """Whether this process may use AMX tiles; asks the system for them. `load` must have succeeded."""
    return torch.cpu.get_capabilities().get("amx_bf16", False) and torch.ops.splitserve.amx_allowed()


def _compile(compiler: str, target: Path) -> None:
    """Written aside and renamed, so that a killed compiler leaves nothing that looks built. Under the lock."""
    for left in target.parent.glob(f"{_ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=target.parent) as folder:
        made, home = Path(folder) / target.name, Path(torch.__file__).parent
        command = [compiler, *_flags(), str(Path(__file__).parent / _SOURCES[0]), "-o", str(made)]
        command += [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        command += [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        try:
            ran = subprocess.run(
                tethered(command), capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DependencyMissing(f"{compiler} took over {_COMPILE_TIMEOUT_S:.0f} s") from error
        if ran.returncode:
            lines = [line for line in ran.stderr.splitlines() if "error" in line] or ran.stderr.splitlines() or [""]
            raise DependencyMissing(f"{compiler} ended with {ran.returncode}: {lines[0][:200]}")
        made.rename(target)


def _flags() -> list[str]:
    return [
        "-O3",
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-fopenmp",
        "-DAT_PARALLEL_OPENMP=1",
        *(f"-m{isa}" for isa in _ISA),
    ]
