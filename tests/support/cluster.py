"""A real cluster in tests: `splitserve serve` as a user starts it, over NATS and Redis that the test can look into."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from splitserve.bus.bus import Bus
from splitserve.protocol.messages import Beat, Message
from splitserve.protocol.subjects import Subjects
from support import servers
from support.processes import alive, environment
from support.waiting import until

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
_HELD = ("splitserve_kv_leases", "splitserve_kv_held_bytes", "splitserve_promised_blocks", "vllm:kv_cache_usage_perc",
         "vllm:num_requests_running", "vllm:num_requests_waiting", "splitserve_requests_awaiting_kv", "splitserve_requests")  # fmt: skip


@dataclass
class Cluster:
    """One running `splitserve serve`."""

    process: subprocess.Popen[bytes]
    nats: servers.Server
    redis: servers.Server
    log: Path
    url: str = ""
    model: str = ""
    expected: tuple[str, ...] = ()  # workers
    routers: tuple[str, ...] = ()

    def wait_ready(self, within_s: float = 180) -> None:
        """Wait for the line that says the URL. RuntimeError with the log when serve ends first."""
        give_up = time.monotonic() + within_s
        while time.monotonic() < give_up:
            text = self.log.read_text(errors="replace")
            if found := re.search(r"^(\S+) answers at (\S+)/v1, ready in", text, re.MULTILINE):
                self.model, self.url = found[1], found[2].replace("localhost", "127.0.0.1")
                self.expected = (*self.names("prefill"), *self.names("decode"))
                self.routers = tuple(self.names("router"))
                return
            if self.process.poll() is not None:
                raise RuntimeError(f"serve ended with {self.process.returncode}:\n{text}")
            time.sleep(0.05)
        raise TimeoutError(f"not ready in {within_s} s:\n{self.log.read_text(errors='replace')}")

    def pid(self, name: str) -> int:
        """Process id of the child of a short name."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            words = child.cmdline()
            if "--name" in words and short(words[words.index("--name") + 1]) == name:
                return child.pid
        raise LookupError(f"no child of the name {name}")

    def names(self, role: str) -> list[str]:
        """Short names of the children of a role."""
        found: list[str] = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            words = child.cmdline()
            if role in words and "--name" in words:
                found.append(short(words[words.index("--name") + 1]))
        return sorted(found)

    def send(self, name: str, number: int) -> None:
        os.kill(self.pid(name), number)

    def stop(self, number: int = signal.SIGINT, within_s: float = 30) -> int:
        """End serve with a signal and give its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(within_s)

    async def workers(self) -> dict[str, Beat]:
        """The latest beat of each live process, by short name. Waits for all that serve was told to run, or two beats long."""
        heard: dict[str, Beat] = {}
        everybody = asyncio.Event()

        def on_message(message: Message, _: str | None) -> None:
            if isinstance(message, Beat):
                heard[short(message.name)] = message
                if heard.keys() >= {*self.expected, *self.routers}:
                    everybody.set()

        bus = await Bus.connect(self.nats.url, name="test", role="router", connect_timeout_s=5)
        try:
            await bus.subscribe(Subjects().all_beats, on_message)
            with suppress(TimeoutError):  # one that is dead or frozen is not heard
                async with asyncio.timeout(1.2):  # two beats
                    await everybody.wait()
        finally:
            await bus.close()
        return heard

    async def everybody_ready(self, within_s: float = 90) -> None:
        """Wait until every child that serve was told to run beats, and the router is ready."""
        give_up = time.monotonic() + within_s
        while True:
            ready = {name for name, beat in (await self.workers()).items() if beat.ready and beat.role != "router"}
            missing = set(self.expected) - ready
            if not missing:
                break
            if time.monotonic() > give_up:
                raise TimeoutError(f"not ready after {within_s} s: {sorted(missing)}")
        async with httpx.AsyncClient() as client:
            (await client.get(f"{self.url}/ready")).raise_for_status()

    async def series(self) -> dict[str, Series]:
        """Every sample of every process, by its name."""
        pages: dict[str, Series] = {}
        async with httpx.AsyncClient(timeout=10) as client:
            targets = {name: beat.metrics_url for name, beat in (await self.workers()).items() if beat.metrics_url}
            for name, url in targets.items():
                page = (await client.get(url)).raise_for_status().text
                pages[name] = {
                    (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                    for family in text_string_to_metric_families(page)
                    for sample in family.samples
                }
        return pages

    async def total(self, name: str, role: str = "", **labels: str) -> float:
        """Sum of a sample with these labels over the processes whose name begins with `role`."""
        pages = await self.series()
        return sum(
            value
            for who, page in pages.items()
            if who.startswith(role)
            for (found, own), value in page.items()
            if found == name and labels.items() <= dict(own).items()
        )

    async def held(self) -> dict[str, float]:
        """What is still held anywhere: leases, blocks, promises, live requests. Empty when nothing is."""
        pages = await self.series()
        return {
            f"{who} {name} {dict(labels)}": value
            for who, page in pages.items()
            for (name, labels), value in page.items()
            if name in _HELD and value
        }

    async def nothing_held(self, within_s: float = 20) -> None:
        """Wait until nothing is held. AssertionError naming what still is."""
        give_up = time.monotonic() + within_s
        while held := await self.held():
            assert time.monotonic() < give_up, f"still held after {within_s} s: {held}"
        keys = Redis.from_url(self.redis.url)
        try:
            forever = [key async for key in keys.scan_iter() if await keys.ttl(key) == -1]
        finally:
            await keys.aclose()
        assert not forever, f"Redis keys without expiry: {forever}"

    def end_with_nothing_held(self) -> None:
        """`nothing_held` for a test that has, or has not, a loop of its own."""
        with ThreadPoolExecutor(1) as other_loop:
            other_loop.submit(asyncio.run, self.nothing_held()).result()


def short(name: str) -> str:
    """`decode-0` of `decode-<host>-<pid>-0`: on a bus that is not its own, `serve` makes its names unique."""
    return re.sub(r"^(prefill|decode|router)-.*-(\d+)$", r"\1-\2", name)


@contextmanager
def running(
    folder: Path, *flags: str, model: Path | str = "", wait: bool = True, **env: str
) -> Generator[Cluster, None, None]:
    """`splitserve serve` with `flags` over own NATS and Redis; in the end nothing is held, and nothing of it is left
    afterwards, or the test fails."""
    nats, redis = servers.nats(folder), servers.redis(folder)
    nats.start()
    redis.start()
    log = folder / "serve.log"
    command = [sys.executable, "-m", "splitserve", "serve", *([str(model)] if model else []), "--port", "0"]
    command += ["--nats", nats.url, "--redis", redis.url, "--drain-timeout", "5", *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment(**env))
    cluster = Cluster(process, nats, redis, log)
    try:
        if wait:
            cluster.wait_ready()
        yield cluster
        if cluster.url and process.poll() is None:
            cluster.end_with_nothing_held()
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        try:
            cluster.stop()
        finally:
            process.kill()
            process.wait()
            _, left = psutil.wait_procs(children, timeout=5)
            for child in left:
                child.kill()
            nats.kill()
            redis.kill()
        assert not left, f"left behind by serve: {left}"


async def gone(pids: list[int]) -> None:
    """Wait until none of these processes runs."""
    await until(lambda: not any(alive(pid) for pid in pids), "their end")
