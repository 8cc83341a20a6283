"""Servers that a benchmark starts: gone, with all that they started, before the next one runs."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from bench import processes
from support.servers import free_port

PARENT = """
import subprocess, sys, time, http.server
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"], start_new_session=True)
open(sys.argv[2], "w").write(str(child.pid))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


@pytest.mark.slow
def test_a_child_in_a_session_of_its_own_is_gone_with_its_server(tmp_path: Path) -> None:
    port, told = free_port(), tmp_path / "child"
    with processes.server("x", [sys.executable, "-c", PARENT, str(port), str(told)], f"http://127.0.0.1:{port}") as pid:
        child = psutil.Process(int(told.read_text()))
        assert {member.pid for member in processes.family([pid])} >= {pid, child.pid}
    assert not psutil.pid_exists(pid)
    assert not processes.alive(child)


@pytest.mark.slow
def test_a_server_that_never_answers_says_its_last_words_and_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_READY_S", 2.0)
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", "import time; print('help me', flush=True); time.sleep(600)"]
    with pytest.raises(RuntimeError, match=r"did not answer(.|\n)*help me"), processes.server("x", command, url):
        pass


def test_a_server_that_ends_says_so_and_why() -> None:
    with (
        pytest.raises(RuntimeError, match=r"x ended by 3: no room"),
        processes.server("x", [sys.executable, "-c", "print('no room'); exit(3)"], f"http://127.0.0.1:{free_port()}"),
    ):
        pass


@pytest.mark.slow
def test_what_a_busy_child_burns_is_its_servers(tmp_path: Path) -> None:
    port = free_port()
    busy = f"import http.server, threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()\nhttp.server.HTTPServer(('127.0.0.1', {port}), http.server.SimpleHTTPRequestHandler).serve_forever()"
    with processes.server("x", [sys.executable, "-c", busy], f"http://127.0.0.1:{port}") as pid:
        assert processes.busy_percent([pid], 0.5) > 10
