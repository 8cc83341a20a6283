"""Addresses of NATS and Redis as given: a URL, or `@FILE` with the URL (and its password) in a file of mode 0600."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from splitserve.errors import ConfigError


def address_of(value: str, flag: str) -> str:
    """The URL that `value` means. Raises ConfigError, naming `flag`, for a missing, empty or readable-by-others file."""
    if not value:
        raise ConfigError(f"{flag} is missing: give a URL, or @FILE as `splitserve serve` prints it")
    if not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror or error}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{flag}: {path} has mode {stat.S_IMODE(mode):04o} and holds a password; chmod it to 0600")
    if not text:
        raise ConfigError(f"{flag}: {path} is empty")
    return text


def write_address(path: Path, url: str) -> None:
    """Write `url` to `path` with mode 0600 from the first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{url}\n")
