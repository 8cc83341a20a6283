"""What a process is called and where others find it: the same line of settings serves every replica of a container."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from splitserve.config import WorkerSettings
from splitserve.errors import ConfigError
from splitserve.protocol.subjects import subject_token

_EVERYWHERE = frozenset({"", "0.0.0.0", "::"})
_NATS_PORT = 4222


def name_of(given: str, role: str) -> str:
    """The stable name as a subject token. `{hostname}` in `given` stands for this machine's. Raises ConfigError."""
    hostname = socket.gethostname()
    return subject_token(given.replace("{hostname}", hostname) if given else f"{role}-{hostname}-{os.getpid()}")


def found_at(listening: str, worker: WorkerSettings, nats: str) -> str:
    """The host that others are told: `--advertise-host`, else the address listened on, else (when that is every address)
    the one by which this machine reaches NATS, for whoever is to find us meets us there.

    `nats` is a URL. Sends nothing. Raises ConfigError when there is no way to NATS.
    """
    if worker.advertise_host:
        return worker.advertise_host
    if listening not in _EVERYWHERE:
        return listening
    url = urlsplit(nats.partition(",")[0])
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            url.hostname, url.port or _NATS_PORT, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.connect(where)  # of a datagram socket: it only picks the route
            return str(sock.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"cannot tell by which address others reach this machine: no way to {url.hostname} ({error.strerror}); "
            "name one with --advertise-host"
        ) from error


def url_of(host: str, port: int, path: str) -> str:
    """`http://host:port/path`, an IPv6 address in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"
