from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from splitserve.errors import PortTaken
from splitserve.runtime.process import Signals, run_process
from support.processes import alive, environment


def test_a_start_up_failure_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    async def main(_: Signals) -> None:
        raise PortTaken("cannot listen on 127.0.0.1:8000")

    assert run_process(main) == 3
    assert capsys.readouterr().err == "splitserve: cannot listen on 127.0.0.1:8000\n"


def test_an_orderly_end_is_zero() -> None:
    async def main(_: Signals) -> None:
        return

    assert run_process(main) == 0


async def test_the_first_signal_asks_to_stop_and_the_second_to_stop_now() -> None:
    signals = Signals()
    assert not signals.stopping
    signals.record(signal.SIGTERM)
    await asyncio.wait_for(signals.stop(), 1)
    assert signals.stopping
    now = asyncio.ensure_future(signals.stop_now())
    await asyncio.sleep(0)
    assert not now.done()
    signals.record(signal.SIGINT)
    await asyncio.wait_for(now, 1)
    assert signals.received == [signal.SIGTERM, signal.SIGINT]


def test_a_real_signal_stops_a_real_process_in_order(tmp_path: Path) -> None:
    script = tmp_path / "service.py"
    script.write_text(
        "import sys\n"
        "from splitserve.runtime.process import run_process\n"
        "async def main(signals):\n"
        "    print('up', flush=True)\n"
        "    await signals.stop()\n"
        "    print('left', flush=True)\n"
        "sys.exit(run_process(main))\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"left\n"
        assert process.wait(10) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's; elsewhere parent_watch does it")
def test_a_killed_parent_leaves_no_child(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import time\n"
        "from splitserve.runtime.process import die_with_parent\n"
        "die_with_parent()\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, {str(child)!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
        process.wait(10)
    asyncio.run(_gone(pid))


def test_a_child_finds_out_that_its_parent_is_gone_where_the_kernel_does_not_tell(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import asyncio, os, sys\n"
        "from splitserve.runtime.process import parent_watch\n"
        "print('up', flush=True)\nasyncio.run(parent_watch(int(sys.argv[1]), every_s=0.05))\n"
    )
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, {str(child)!r}, str(os.getpid())], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        assert alive(pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    asyncio.run(_gone(pid))


async def _gone(pid: int) -> None:
    from support.waiting import until

    await until(lambda: not alive(pid), f"the end of process {pid}")
