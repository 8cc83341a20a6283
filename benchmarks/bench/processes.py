"""Servers as child processes: started, waited for, measured, and ended with all that they started themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

_READY_S = 600.0
_STOP_S = 90.0
_GONE_S = 30.0


def stop_on_sigterm() -> None:
    """SIGTERM ends this process by SystemExit, so that the servers it started are ended too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


@contextmanager
def server(
    name: str, command: Sequence[str], ready: str, environment: Mapping[str, str] | None = None
) -> Generator[int]:
    """Run a server until the block ends; its process id. When the block is left, it and its descendants are gone.

    RuntimeError, with the end of its log, when `ready` does not answer in time.
    """
    with tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | (environment or {}), start_new_session=True
        )
        try:
            _wait(name, process, ready, Path(log.name))
            yield process.pid
        finally:
            _end(name, process)


def _wait(name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    give_up = time.monotonic() + _READY_S
    while time.monotonic() < give_up and process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).is_success:
                return
        time.sleep(0.5)
    end = "\n".join(log.read_text().splitlines()[-5:])
    did = f"did not answer at {url} in {_READY_S:.0f} s" if process.poll() is None else f"ended by {process.returncode}"
    raise RuntimeError(f"{name} {did}: {end}")


def _end(name: str, process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, kill what is left after that. RuntimeError when something will not go."""
    members = family([process.pid])
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    members |= family(member.pid for member in members)  # what was started while it stopped
    if not _gone(members, 2.0):
        for member in filter(alive, members):
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(_GONE_S)
    if not _gone(members, _GONE_S):
        raise RuntimeError(f"{name} left processes that survive SIGKILL: {[m.pid for m in members if alive(m)]}")


def _gone(members: Iterable[psutil.Process], seconds: float) -> bool:
    give_up = time.monotonic() + seconds
    while any(alive(member) for member in members):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(roots: Iterable[int]) -> set[psutil.Process]:
    """`roots`, their descendants, and whoever shares a session with one of them: also what an ended parent left."""
    found = set[psutil.Process]()
    for pid in roots:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            found |= {root, *root.children(recursive=True)}
    sessions = {_session(member.pid) for member in found} - {None, os.getsid(0)}
    return found | {member for member in psutil.process_iter() if _session(member.pid) in sessions}


def _session(pid: int) -> int | None:
    with suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return None


def cpu_seconds(members: Iterable[psutil.Process]) -> dict[int, float]:
    """CPU time of each that still lives."""
    spent: dict[int, float] = {}
    for member in members:
        with suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            spent[member.pid] = times.user + times.system
    return spent


def busy_percent(roots: Sequence[int], seconds: float) -> float:
    """What the families of `roots` take of the CPU from now on, in per cent of one core."""
    members = family(roots)
    before, began = cpu_seconds(members), time.monotonic()
    time.sleep(seconds)
    after, took = cpu_seconds(members), time.monotonic() - began
    return 100 * sum(spent - before[pid] for pid, spent in after.items() if pid in before) / took
