"""llama.cpp as a peer: its own server, built from the sources that llama-cpp-python's source package brings along, and the
default model in bfloat16, made of the GGUF file that ours is made of. Nothing of it is part of this project."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from bench.peers import NAME, Served
from bench.processes import server
from splitserve.model.embedded import SMOLLM2, fetch

FOLDER = Path(os.environ.get("PEER_LLAMA", str(Path.home() / ".cache" / "splitserve" / "peer-llama")))
_SOURCES = "llama-cpp-python==0.3.36"
_SERVER, _MODEL = FOLDER / "llama-server", FOLDER / "model-bf16.gguf"
_TARGETS = ("llama-server", "llama-quantize")
_OPTIONS = (
    *("CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF"),
    *("LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF"),
)


def set_up() -> None:
    """Build the server and make the model unless they are there: a C++ compiler, CMake, and a quarter of an hour."""
    if _SERVER.exists() and _MODEL.exists():
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as work:
        built = _build(Path(work))
        gguf = fetch(SMOLLM2, Path(work, "gguf"))
        quantize = [str(built / "llama-quantize"), "--allow-requantize", str(gguf), str(_MODEL), "BF16"]
        subprocess.run(quantize, check=True)
        (built / "llama-server").rename(_SERVER)


def _build(work: Path) -> Path:
    """The folder of the programs."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(work)]
    subprocess.run([*pip, _SOURCES], check=True)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(work, filter="data")
    (sources,) = work.glob("*/vendor/llama.cpp")
    options = [f"-D{option}" for option in _OPTIONS]
    subprocess.run(["cmake", "-S", str(sources), "-B", str(work / "build"), *options], check=True)
    make = ["cmake", "--build", str(work / "build"), "--parallel", str(len(os.sched_getaffinity(0))), "--target"]
    subprocess.run([*make, *_TARGETS], check=True)
    return work / "build" / "bin"


@contextmanager
def llama(port: int, cores: int) -> Generator[Served]:
    """llama.cpp's server with a thread a core, one request at a time."""
    url = f"http://127.0.0.1:{port}"
    command = [str(_SERVER), "--model", str(_MODEL), "--alias", NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(cores), "--ctx-size", "4096", "--parallel", "1"]
    with server("llama", command, f"{url}/health") as pid:
        yield Served(url, (pid,))
