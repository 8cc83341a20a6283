"""`splitserve serve` as a user has it: its own NATS and Redis, Ctrl-C, SIGKILL, workers that join."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from support.cluster import gone
from support.processes import environment
from support.servers import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.slow]

FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "64MiB", "--drain-timeout", "5")


@contextmanager
def serve(folder: Path, log: Path, *flags: str, port: int) -> Generator[subprocess.Popen[bytes], None, None]:
    command = [sys.executable, "-m", "splitserve", "serve", str(folder), "--port", str(port), *FLAGS, *flags]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(log: Path, pattern: str, process: subprocess.Popen[bytes], within_s: float = 120) -> str:
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        text = log.read_text(errors="replace")
        if found := re.search(pattern, text, re.MULTILINE):
            return found[1]
        assert process.poll() is None, f"serve ended with {process.returncode}:\n{text}"
        time.sleep(0.1)
    raise TimeoutError(log.read_text(errors="replace"))


@pytest.fixture(scope="module")
def tiny_folder(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that loads and answers at once, for what is about processes only."""
    from support.tiny_models import save_twin  # late: it loads torch

    return save_twin(smollm2_folder, tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
async def test_whatever_ends_serve_no_process_of_it_runs(
    tiny_folder: Path, tmp_path: Path, number: int, code: int
) -> None:
    port, log = free_port(), tmp_path / "log"
    with serve(tiny_folder, log, port=port) as process:
        line = wait_for_line(log, r"^(curl .*)$", process)
        done = subprocess.run(shlex.split(line), capture_output=True, timeout=60, check=False)
        assert b'"finish_reason"' in done.stdout, done
        pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(pids) >= 5  # NATS, Redis, prefill, decode, router
        os.kill(process.pid, number)
        assert process.wait(30) == code
        await gone(pids)


async def test_a_worker_that_joins_from_another_terminal_is_used_and_may_leave(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "log"
    with serve(smollm2_folder, log, "--split", "always", port=port) as process:
        join = wait_for_line(log, r"(splitserve decode .*)$", process)
        command = [sys.executable, "-m", *shlex.split(join), "--name", "guest"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment()) as guest:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                await _used_by(http, "guest", within_s=60)
                guest.send_signal(signal.SIGTERM)
                assert guest.wait(30) == 0
                answer = await _complete(http, "After it left")
                assert answer["choices"][0]["finish_reason"] == "length"


async def _complete(http: httpx.AsyncClient, prompt: str) -> dict[str, list[dict[str, str]]]:
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
    body["model"] = (await http.get("/v1/models")).json()["data"][0]["id"]
    answer = await http.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()


async def _used_by(http: httpx.AsyncClient, worker: str, within_s: float) -> None:
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        ids = [(await _complete(http, f"{n} {time.monotonic()}"))["id"] for n in range(1)]
        # several at once: an idle pair would go to the same worker for ever
        answers = await asyncio.gather(*(_complete(http, f"{n} of four {time.monotonic()}") for n in range(4)))
        for rid in [*ids, *(a["id"] for a in answers)]:
            if (await http.get(f"/v1/requests/{rid}")).json()["decode_worker"] == worker:
                return
    raise TimeoutError(f"{worker} was not used in {within_s} s")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitserve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment())


def test_a_taken_port_is_one_line_and_an_exit_code(smollm2_folder: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock:
        ended = run("serve", str(smollm2_folder), "--port", str(sock.getsockname()[1]))
    assert ended.returncode == 3
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "cannot listen on 127.0.0.1" in ended.stderr


def test_a_model_that_is_not_there_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    ended = run("serve", str(tmp_path / "nothing"), "--port", "0")
    assert ended.returncode == 5
    assert "Traceback" not in ended.stderr
