"""How `splitserve serve` fails to start: one clear line, an exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.cluster import gone
from support.processes import environment
from support.servers import Server, free_port

pytestmark = [pytest.mark.e2e]


_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
}


def serve(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`splitserve serve` to its own end; its temporary files, hence its run folder, are looked at afterwards."""
    command = [sys.executable, "-m", "splitserve", "serve", "--port", "0", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment(**env))


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("splitserve: "), done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where run folders are made; must be empty again."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def unservable(folder: Path) -> Path:
    """A folder that looks whole and holds an encoder-decoder, which the load gate refuses before it reads weights."""
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    (folder / "config.json").write_text(json.dumps({**config, "d_model": 8, "max_position_embeddings": 64}))
    (folder / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_an_architecture_that_cannot_be_served_stops_everything_at_once(tmp_path: Path, base: Path) -> None:
    done = serve(str(unservable(tmp_path)))
    assert done.returncode == 6, done.stderr
    assert "cannot start" in last_line(done)
    assert "encoder-decoder" in last_line(done)
    assert os.listdir(base) == []


def test_too_little_memory_is_said_before_a_worker_starts(tmp_path: Path, base: Path) -> None:
    done = serve(str(unservable(tmp_path)), "--kv-cache-memory-bytes", "900TiB")
    assert done.returncode == 4, done.stderr
    assert re.search(r"2 workers need about [\d.]+ GiB .* GiB are free: --prefill 0", last_line(done))
    assert "loads" not in done.stdout
    assert os.listdir(base) == []


def test_a_bus_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    flags = ("--nats", f"nats://127.0.0.1:{free_port()}", "--connect-timeout", "1")
    done = serve(str(unservable(tmp_path)), *flags)
    assert done.returncode == 8, done.stderr
    assert "NATS at nats://127.0.0.1" in last_line(done)


def test_an_address_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "nats"
    file.write_text("nats://user:password@127.0.0.1:4222\n")
    file.chmod(0o644)
    done = serve(str(unservable(tmp_path)), "--nats", f"@{file}")
    assert done.returncode == 2
    assert "chmod it to 0600" in last_line(done)


@pytest.mark.model
def test_workers_that_never_become_ready_are_given_up(smollm2_folder: Path, base: Path) -> None:
    done = serve(str(smollm2_folder), "--start-timeout", "3", SPLITSERVE_FAULTS="worker.never_ready")
    assert done.returncode == 8, done.stderr
    assert "was not ready in 3 s" in last_line(done)
    assert os.listdir(base) == []


@pytest.mark.model
async def test_ctrl_c_while_everything_is_loading_leaves_nothing(
    smollm2_folder: Path, base: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "splitserve", "serve", str(smollm2_folder), "--port", "0", "--drain-timeout", "5"]
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment()) as process:
        try:
            give_up = time.monotonic() + 60
            while "decode-0 loads" not in log.read_text():
                assert time.monotonic() < give_up, log.read_text()
                time.sleep(0.02)
            pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()
    await gone(pids)
    assert os.listdir(base) == []


@pytest.mark.usefixtures("base")
def test_two_clusters_on_one_bus_do_not_share_worker_names(tmp_path: Path, shared_nats: Server) -> None:
    done = serve(str(unservable(tmp_path)), "--nats", shared_nats.url)
    assert re.search(r"(prefill|decode)-\S+-\d+-0 cannot start", last_line(done))
