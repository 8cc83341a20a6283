from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from splitserve.errors import PortTaken
from splitserve.runtime.process import Signals, run_process
from support.processes import environment


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


def ended(tmp_path: Path, then: str) -> subprocess.CompletedProcess[bytes]:
    """A process whose service starts a thread that stays in native code, and then does this."""
    script = tmp_path / "service.py"
    script.write_text(
        "import sys, time\n"
        "from splitserve.runtime.process import NativeThread, run_process\n"
        "async def main(signals):\n"
        "    NativeThread(lambda: time.sleep(600), 'deep').start()\n"
        f"    {then}\n"
        "sys.exit(run_process(main) + 7)\n"  # 7 and up: the interpreter went on to its own end
    )
    command = [sys.executable, str(script)]
    return subprocess.run(command, capture_output=True, env=environment(), timeout=60, check=False)


def test_a_thread_deep_in_native_code_does_not_change_how_a_process_ends(tmp_path: Path) -> None:
    ran = ended(tmp_path, "print('left')")
    assert (ran.returncode, ran.stdout) == (0, b"left\n")


def test_a_failure_nobody_foresaw_is_told_and_ends_a_process_with_such_a_thread_too(tmp_path: Path) -> None:
    ran = ended(tmp_path, "raise ZeroDivisionError('unforeseen')")
    assert ran.returncode == 1
    assert b"ZeroDivisionError: unforeseen" in ran.stderr


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
