from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from splitserve.errors import NeverReady, NotEnoughMemory
from splitserve.protocol.messages import Beat
from splitserve.serve.child import Spec
from splitserve.serve.policy import Rules
from splitserve.serve.supervisor import Supervisor, run_once

QUICK = Rules(start_s=20, stuck_s=30, first_pause_s=0.01, longest_pause_s=0.05, failed_starts=3)
SLEEPS = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


def script(name: str, text: str) -> Spec:
    return Spec(name, (sys.executable, "-c", text))


class Stage:
    """A supervisor under test: what its children said, and how often each became ready."""

    def __init__(self, rules: Rules) -> None:
        self.ready: list[str] = []
        self.lines: list[str] = []
        self.supervisor = Supervisor(rules, self.ready.append)
        self.keep = asyncio.create_task(self.supervisor.keep())

    def add(self, spec: Spec) -> None:
        """Ready once it has printed `up` in its present life."""
        seen = 0

        async def probe() -> bool:
            nonlocal seen
            if (count := self.lines.count(f"{spec.name} up")) > seen:
                seen = count
                return True
            return False

        self.supervisor.add(spec, lambda line: self.lines.append(f"{spec.name} {line}"), probe)

    async def until(self, what: object, count: int) -> None:
        async with asyncio.timeout(20):
            while self.ready.count(str(what)) < count:
                assert not self.keep.done(), self.keep.exception()
                await asyncio.sleep(0.01)


@asynccontextmanager
async def stage(rules: Rules = QUICK) -> AsyncGenerator[Stage, None]:
    made = Stage(rules)
    try:
        yield made
    finally:
        made.keep.cancel()
        await asyncio.gather(made.keep, return_exceptions=True)
        await made.supervisor.kill_all()
        assert made.supervisor.pids() == {}


async def test_a_child_that_is_killed_comes_back_with_a_new_pid() -> None:
    async with stage() as on:
        on.add(script("worker", SLEEPS))
        await on.supervisor.ready(["worker"])
        before = on.supervisor.pids()["worker"]
        os.kill(before, signal.SIGKILL)
        await on.until("worker", 2)
        assert on.supervisor.pids()["worker"] != before


async def test_a_child_whose_beats_say_that_it_is_stuck_is_killed_and_comes_back() -> None:
    async with stage() as on:
        on.add(script("worker", SLEEPS))
        await on.supervisor.ready(["worker"])
        on.supervisor.heard(Beat("worker", "decode", 1, step_age_ms=29_000))
        before = on.supervisor.pids()["worker"]
        on.supervisor.heard(Beat("worker", "decode", 1, step_age_ms=31_000))
        await on.until("worker", 2)
        assert on.supervisor.pids()["worker"] != before


async def test_a_worker_is_ready_when_its_beat_says_so_and_strangers_do_not_matter() -> None:
    async with stage() as on:
        on.supervisor.add(script("worker", SLEEPS), lambda _: None)
        ready = asyncio.create_task(on.supervisor.ready(["worker"]))
        async with asyncio.timeout(20):
            while not on.supervisor.pids():  # noqa: ASYNC110  # a process, not ours to signal
                await asyncio.sleep(0.01)
        on.supervisor.heard(Beat("stranger", "decode", 1))
        on.supervisor.heard(Beat("worker", "decode", 1, ready=False))
        await asyncio.sleep(0)
        assert not ready.done()
        on.supervisor.heard(Beat("worker", "decode", 1, ready=True))
        async with asyncio.timeout(20):
            await ready


async def test_a_child_that_cannot_start_ends_the_whole_with_its_error_and_its_words() -> None:
    async with stage() as on:
        on.add(script("worker", "import sys; print('splitserve: 3 GiB needed, 1 GiB free'); sys.exit(4)"))
        with pytest.raises(NotEnoughMemory, match="worker cannot start: 3 GiB needed, 1 GiB free"):
            await asyncio.wait_for(on.keep, 20)


async def test_a_child_that_crashes_again_and_again_is_given_up() -> None:
    async with stage() as on:
        on.add(script("worker", "raise SystemExit('boom')"))
        with pytest.raises(NeverReady, match=r"3 starts.*boom"):
            await asyncio.wait_for(on.keep, 20)


async def test_a_child_that_runs_and_never_becomes_ready_is_given_up() -> None:
    async with stage(Rules(start_s=0.2)) as on:
        on.add(script("worker", "import time; time.sleep(600)"))
        with pytest.raises(NeverReady, match=r"was not ready in 0\.2 s"):
            await asyncio.wait_for(on.keep, 20)


async def test_children_are_stopped_group_after_group(tmp_path: Path) -> None:
    log = tmp_path / "log"
    leaves = """
import signal, sys, time
def leave(*_):
    open({log!r}, "a").write({name!r} + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
time.sleep(600)
"""
    async with stage() as on:
        for name in ("router", "worker", "nats"):
            on.add(script(name, leaves.format(log=str(log), name=name)))
        await on.supervisor.ready(["router", "worker", "nats"])
        on.keep.cancel()
        await on.supervisor.stop([["router"], ["worker"], ["nats"]], 20, asyncio.Event())
    assert log.read_text().split() == ["router", "worker", "nats"]


async def test_a_child_that_does_not_leave_in_time_is_killed() -> None:
    async with stage() as on:
        on.add(script("worker", STUBBORN))
        await on.supervisor.ready(["worker"])
        on.keep.cancel()
        began = time.monotonic()
        await on.supervisor.stop([["worker"]], 0.1, asyncio.Event())
        assert time.monotonic() - began < 15
        assert on.supervisor.pids() == {}


async def test_a_second_stop_signal_ends_the_wait() -> None:
    async with stage() as on:
        on.add(script("worker", STUBBORN))
        await on.supervisor.ready(["worker"])
        on.keep.cancel()
        at_once = asyncio.Event()
        stopping = asyncio.create_task(on.supervisor.stop([["worker"]], 600, at_once))
        await asyncio.sleep(0.05)
        assert not stopping.done()
        at_once.set()
        async with asyncio.timeout(20):
            await stopping


async def test_a_helper_that_is_cancelled_is_killed() -> None:
    pids: list[int] = []
    told = asyncio.Event()

    def line(text: str) -> None:
        pids.append(int(text))
        told.set()

    work = asyncio.create_task(
        run_once(script("model", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"), line)
    )
    async with asyncio.timeout(20):
        await told.wait()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


async def test_very_long_lines_do_not_stop_a_child() -> None:
    lines: list[str] = []
    await run_once(script("talker", "print('x' * 5_000_000); print('end')"), lines.append)
    assert lines[-1] == "end"
