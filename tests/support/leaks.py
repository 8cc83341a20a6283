"""What a test may leave behind: nothing. The fixtures here look after every test of the suite.

`nothing_left` is set up before any other fixture of a test and so looks after all of them are torn down, the event loop
too; `tasks_end` looks inside the loop just before it closes. Both take well under a millisecond when nothing is left;
what seems left is given `SETTLE_S` to end before it is called a leak.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncGenerator, Callable, Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from redis import Redis

from support.servers import Server

if TYPE_CHECKING:
    from support.cluster import Cluster

SETTLE_S = 1.0
# threads that libraries start once a process and never end
KNOWN_THREADS = ("pytest_timeout", "tqdm", "TMonitor")

Look = Callable[[], set[str]]


def open_files() -> set[str]:
    """`number -> what` of every file descriptor of this process: files, sockets, pipes, memfds (a map keeps its own)."""
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    found: set[str] = set()
    for number in os.listdir(folder):
        with suppress(OSError):  # the descriptor of the listing itself
            found.add(f"file {number} -> {os.readlink(f'{folder}/{number}') if sys.platform == 'linux' else '?'}")
    return found


def threads() -> set[str]:
    """Every live thread but those that libraries keep for ever."""
    return {
        f"thread {thread.name} ({thread.ident})"
        for thread in threading.enumerate()
        if not thread.name.startswith(KNOWN_THREADS)
    }


def children() -> set[str]:
    """Child processes, those that ended and were not waited for included."""
    if sys.platform != "linux":
        return {f"process {child.pid}" for child in psutil.Process().children()}
    pids: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # a thread that has ended meanwhile
            pids.update(Path(f"/proc/self/task/{task}/children").read_text().split())
    return {f"process {pid}" for pid in pids}


def connections(nats: Server) -> list[dict[str, Any]]:
    """Every connection to a NATS server, with its subscriptions."""
    with urllib.request.urlopen(f"http://127.0.0.1:{nats.monitor}/connz?subs=1", timeout=5) as answer:
        return json.load(answer)["connections"]


def subscriptions(nats: Server, known: Container[int] = ()) -> set[str]:
    """Every subscription to a NATS server but those of connections in `known`: of processes that several tests share."""
    return {
        f"subscription {subject} of {connection.get('name', '')} ({connection['cid']})"
        for connection in connections(nats)
        if connection["cid"] not in known
        for subject in connection.get("subscriptions_list", ())
    }


def keys_without_expiry(redis: Server) -> set[str]:
    """Keys of a Redis server that would stay for ever."""
    with Redis.from_url(redis.url, socket_timeout=5) as client:
        return {f"Redis key {key.decode()} without expiry" for key in client.scan_iter() if client.ttl(key) == -1}


def left(before: set[str], look: Look, within_s: float = SETTLE_S) -> list[str]:
    """What `look` still finds beyond `before` after what is ending had `within_s` to end, in order."""
    found = look() - before
    if found:
        gc.collect()  # what only a cycle holds is not left: its ResourceWarning says so, if it should have been closed
    give_up = time.monotonic() + within_s
    while found and time.monotonic() < give_up:
        time.sleep(0.01)
        found = look() - before
    return sorted(found)


async def unfinished(within_s: float = SETTLE_S) -> list[str]:
    """Tasks of this loop beside the one that asks, after what is ending had `within_s` to end."""
    mine = asyncio.current_task()
    give_up = time.monotonic() + within_s
    while (tasks := asyncio.all_tasks() - {mine}) and time.monotonic() < give_up:
        await asyncio.wait(tasks, timeout=0.01)
    return sorted(f"task {task.get_name()} in {task.get_coro()}" for task in tasks)


def _servers(cluster: Cluster) -> set[str]:
    """NATS and Redis of a cluster that several tests share, each of which may start them anew."""
    return {f"process {server.process.pid}" for server in (cluster.nats, cluster.redis) if server.process}


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves files, sockets, memfds, threads, processes, subscriptions or immortal keys behind."""
    looks: list[Look] = [open_files, threads, children]
    if "shared_nats" in request.fixturenames:
        nats: Server = request.getfixturevalue("shared_nats")
        known = {connection["cid"] for connection in connections(nats)}
        looks.append(lambda: subscriptions(nats, known))
    if "shared_redis" in request.fixturenames:
        redis: Server = request.getfixturevalue("shared_redis")
        looks.append(lambda: keys_without_expiry(redis))
    if "running_small" in request.fixturenames:
        cluster: Cluster = request.getfixturevalue("running_small")
        looks[looks.index(children)] = lambda: children() - _servers(cluster)
    before = [look() for look in looks]
    yield
    request.node.funcargs.clear()  # the torn down fixtures' values, which pytest would keep a little longer
    found = [what for look, had in zip(looks, before, strict=True) for what in left(had, look)]
    assert not found, f"left behind: {', '.join(found)}"


@pytest.fixture
async def tasks_end(nothing_left: None) -> AsyncGenerator[None, None]:
    """Fails a test that leaves a task behind; the loop would cancel it and say nothing."""
    yield
    found = await unfinished()
    assert not found, f"left behind: {', '.join(found)}"


@pytest.fixture(autouse=True)
def no_task_left(nothing_left: None, request: pytest.FixtureRequest) -> None:
    """`tasks_end` for tests that run in a loop; the others need none."""
    if request.node.get_closest_marker("asyncio"):
        request.getfixturevalue("tasks_end")
