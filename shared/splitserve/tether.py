"""Commands that cannot outlive the process that started them, not even one that is killed with SIGKILL.

`tethered(command)` puts this file, run as a script with the standard library alone, in front of a command: it ties the
process to its parent, pins it to processors, and becomes the command (exec). On Linux the kernel does the tying
(PR_SET_PDEATHSIG survives exec); elsewhere a small watcher beside the command looks once a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_NOWHERE = "-"


def tethered(command: Sequence[str], cpus: Sequence[int] = ()) -> list[str]:
    """`command`, tied to this process. `cpus`: run on these processors only (Linux).

    On Linux the tie is to the *thread* that starts it: start it from one that lives as long as the command may.
    """
    pins = ",".join(map(str, cpus)) or _NOWHERE
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), pins, *command]


def _watch(parent: int, every_s: float = 1.0) -> None:
    """Leave a watcher behind that kills this process when `parent` is gone; returns in this process only."""
    import subprocess  # not on Linux's way: it doubles the start

    command = os.getpid()
    if os.fork():
        return
    os.setsid()
    while os.getppid() == command:
        said = subprocess.run(["ps", "-o", "ppid=", "-p", str(command)], capture_output=True, text=True, check=False)
        if said.stdout.strip() not in {str(parent), ""}:  # adopted by init: the parent died
            os.kill(command, signal.SIGKILL)
        time.sleep(every_s)
    os._exit(0)


def main(parent: int, pins: str, command: Sequence[str], platform: str = sys.platform) -> None:
    """Become `command`. Exits with 127 and one line when it cannot be executed."""
    if platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        _watch(parent)
    if os.getppid() != parent:  # it died before the tie was made
        os._exit(1)
    if pins != _NOWHERE and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(cpu) for cpu in pins.split(",")})
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
