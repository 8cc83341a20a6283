from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splitserve.tether import tethered

PARENT = """
import subprocess, sys
from splitserve.tether import tethered
child = subprocess.Popen(tethered([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]))
print(child.pid, flush=True)
child.wait()
"""


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether the process ends in time (a zombie has ended)."""
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ties only on Linux")
def test_a_tethered_command_dies_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, up = int(parent.stdout.readline()), parent.stdout.readline()
        assert up == "up\n"
        parent.kill()
        assert gone(pid)


WATCHED = """
import os, sys
from splitserve import tether
tether.main(int(sys.argv[1]), "-", [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"], "darwin")
"""

WATCHED_PARENT = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WATCHED!r}, str(os.getpid())])
print(child.pid, flush=True)
child.wait()
"""


def test_where_the_kernel_does_not_tie_a_watcher_does() -> None:
    with subprocess.Popen([sys.executable, "-c", WATCHED_PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, up = int(parent.stdout.readline()), parent.stdout.readline()
        assert up == "up\n"
        parent.kill()
        assert gone(pid)


def test_a_tethered_command_keeps_its_arguments_exit_code_and_pid() -> None:
    script = "import os, sys; print(os.getpid(), sys.argv[1]); sys.exit(7)"
    with subprocess.Popen(tethered([sys.executable, "-c", script, "a b"]), stdout=subprocess.PIPE, text=True) as child:
        said, _ = child.communicate(timeout=30)
    assert said == f"{child.pid} a b\n"
    assert child.returncode == 7


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no pinning here")
def test_a_tethered_command_runs_on_the_processors_it_was_given() -> None:
    cpu = max(os.sched_getaffinity(0))
    script = "import os; print(os.sched_getaffinity(0))"
    done = subprocess.run(tethered([sys.executable, "-c", script], [cpu]), capture_output=True, text=True, timeout=30)
    assert done.stdout == f"{{{cpu}}}\n"


def test_a_command_that_does_not_exist_is_one_line() -> None:
    done = subprocess.run(tethered(["/no/such/thing"]), capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert done.stderr == "cannot run /no/such/thing: No such file or directory\n"


def test_a_stopped_signal_reaches_the_command_itself() -> None:
    with subprocess.Popen(tethered(["sleep", "600"])) as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == -signal.SIGTERM
