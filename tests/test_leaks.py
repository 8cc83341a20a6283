"""What looks after every test (`support.leaks`) is itself looked after: each kind of leak is found, and named."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from redis import Redis

from splitserve.bus.bus import Bus
from support import leaks
from support.servers import Server

pytest_plugins = ["pytester"]


def test_a_file_that_stays_open_is_named() -> None:
    before = leaks.open_files()
    reader, writer = os.pipe()
    found = leaks.left(before, leaks.open_files, within_s=0)
    os.close(reader)
    os.close(writer)
    assert len(found) == 2
    assert found[0].startswith(f"file {reader} -> ") or sys.platform != "linux"
    assert not leaks.left(before, leaks.open_files)


@pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")
def test_shared_memory_without_a_name_is_found_as_long_as_it_is_mapped() -> None:
    import mmap

    before = leaks.open_files()
    fd = os.memfd_create("a-leak")
    os.ftruncate(fd, mmap.PAGESIZE)
    memory = mmap.mmap(fd, mmap.PAGESIZE)
    os.close(fd)
    (found,) = leaks.left(before, leaks.open_files, within_s=0)
    memory.close()
    assert "memfd:a-leak" in found


def test_a_thread_that_runs_on_is_named_and_one_that_is_ending_is_waited_for() -> None:
    before, end = leaks.threads(), threading.Event()
    thread = threading.Thread(target=end.wait, name="a-leak", daemon=True)
    thread.start()
    (found,) = leaks.left(before, leaks.threads, within_s=0)
    assert "a-leak" in found
    threading.Timer(0.05, end.set).start()
    assert not leaks.left(before, leaks.threads)


def test_a_child_is_found_until_it_was_waited_for() -> None:
    before = leaks.children()
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE) as child:
        assert leaks.left(before, leaks.children, within_s=0) == [f"process {child.pid}"]
    assert not leaks.left(before, leaks.children, within_s=0)


async def test_a_task_that_runs_on_is_named() -> None:
    task = asyncio.create_task(asyncio.sleep(60), name="a-leak")
    (found,) = await leaks.unfinished(within_s=0)
    task.cancel()
    assert "a-leak" in found
    assert not await leaks.unfinished()


async def test_a_subscription_that_nobody_ended_is_named(shared_nats: Server) -> None:
    before = leaks.subscriptions(shared_nats)
    bus = await Bus.connect(shared_nats.url, name="leaky", role="router", connect_timeout_s=10)
    await bus.subscribe("t.leak", lambda _message, _reply_to: None)
    await bus.flush(2)
    found = leaks.subscriptions(shared_nats) - before
    await bus.close()
    assert any("t.leak of leaky" in what for what in found)


def test_a_key_that_never_expires_is_named(shared_redis: Server) -> None:
    with Redis.from_url(shared_redis.url) as client:
        client.set("mortal", 1, ex=60)
        client.set("a-leak", 1)
        found = leaks.keys_without_expiry(shared_redis)
        client.delete("mortal", "a-leak")
    assert found == {"Redis key a-leak without expiry"}


def test_the_fixtures_fail_tests_that_leave_something_and_no_other(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [str(Path(__file__).parents[1] / root) for root in ("services", "shared", "tests")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(roots))
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makeconftest("pytest_plugins = ['support.leaks']\n")
    pytester.makepyfile(
        """
        import asyncio, os

        kept = []

        def test_clean():
            os.close(os.open("/dev/null", os.O_RDONLY))

        async def test_clean_in_a_loop():
            await asyncio.create_task(asyncio.sleep(0))

        def test_file():
            kept.append(os.open("/dev/null", os.O_RDONLY))

        async def test_task():
            kept.append(asyncio.create_task(asyncio.sleep(60)))
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:randomly")
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines_random(["*left behind: file * -> /dev/null*", "*left behind: task *sleep*"])
