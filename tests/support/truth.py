"""One cluster, one load in three parts, and everything that was seen of it: what test_metrics_truth judges."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from support.client_log import Client, ClientLog
from support.cluster import Cluster, running
from support.metrics_watch import Page, Watch, fetch, total, watching

KEY = "the-key"
FLEET = "fleet"
FLAGS = (
    "--dtype", "float32", "--log-format", "text", "--prefill", "1", "--decode", "2", "--split", "always",
    "--kv-transport", "shm", "--kv-cache-memory-bytes", "24MiB", "--max-waiting-requests", "6", "--api-key", KEY,
    "--threads", "1", "--max-num-batched-tokens", "128", "--legacy-metrics",
)  # fmt: skip
FREEZE_S = 1.0
LONG = "The lighthouse keeper wrote down the weather, the ships and the birds of every day of the year. "


@dataclass
class Part:
    """One part of the load: what the client logged, and the pages of all processes before and after."""

    log: ClientLog
    before: Mapping[str, Page]
    after: Mapping[str, Page]

    def rose(self, name: str, **labels: str) -> float:
        """By how much the sum over all processes rose."""
        return total(self._all(self.after), name, **labels) - total(self._all(self.before), name, **labels)

    @staticmethod
    def _all(pages: Mapping[str, Page]) -> list[Page]:
        return [page for who, page in pages.items() if who != FLEET]


@dataclass
class Story:
    """All parts, and what was seen meanwhile."""

    start: Mapping[str, Page]  # ready, and nothing was asked for yet
    streams: Part
    mixed: Part
    rough: Part  # refusals, clients that leave, a burst, a freeze
    killed: Part
    left: int  # streams that the client closed
    watch: Watch
    texts: Mapping[str, bytes] = field(default_factory=dict[str, bytes])  # the last page of each process, as sent


class Teller:
    """Drives the load and takes the pages."""

    def __init__(self, cluster: Cluster, urls: dict[str, str]) -> None:
        self.cluster = cluster
        self.urls = urls
        self.client = Client(cluster.url, cluster.model, KEY)
        self._random = random.Random(11)

    @classmethod
    async def of(cls, cluster: Cluster) -> Teller:
        return cls(cluster, await _urls(cluster))

    def ids(self, count: int) -> list[int]:
        """A prompt that nobody sent before."""
        return [self._random.randrange(100, 40_000) for _ in range(count)]

    async def pages(self) -> dict[str, Page]:
        """Everybody's, once the cluster is at rest."""
        await self._rest()
        return {who: await fetch(url) for who, url in self.urls.items()}

    async def _rest(self, within_s: float = 30) -> None:
        give_up = asyncio.get_running_loop().time() + within_s
        while True:
            pages = [await fetch(url) for who, url in self.urls.items() if who != FLEET]
            busy = {n: total(pages, n) for n in ("splitserve_requests", "splitserve_kv_leases", "vllm:num_requests_running")}  # fmt: skip
            if not any(busy.values()):
                break
            if asyncio.get_running_loop().time() > give_up:
                raise TimeoutError(f"still at work after {within_s} s: {busy}")
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.1)  # the fleet page is up to a second old

    async def streams(self) -> None:
        for round_ in range(4):
            await asyncio.gather(*(self.client.stream(f"Tale {round_}.{n}: once upon", 8) for n in range(3)))

    async def mixed(self) -> None:
        whole = self.client.whole
        await whole("Name a colour.", 8)
        await whole("Name three colours, one after the other.", 6, n=3)
        await whole(["The sun is", "The moon is"], 6)
        await whole(LONG * 5, 5)
        await whole(LONG * 5 + "Then", 5)  # its prefix is cached
        answer = await self.client.api.completions.create(
            model=self.client.model, prompt="Count: 1, 2, 3,", max_tokens=24, temperature=0, stop=","
        )
        self.client.log.add(answer.usage, [choice.finish_reason for choice in answer.choices])
        await whole(self.ids(20), 1)

    async def rough(self, watch: Watch) -> int:
        """Refusals, clients that leave, a burst, a freeze. Gives how many clients left."""
        client = self.client
        await client.refused(prompt=[5] * 20_000)
        await client.refused(model="gpt-9")
        await client.refused(temperature=-1)
        await client.refused(suffix="an end")
        await client.refused(prompt="x" * (9 << 20))
        await self._bad_key()
        for events in (1, 2):
            await client.leave(self.ids(30), 64, events=events)
        await self._leave_unanswered()
        await client.burst([self.ids(60) for _ in range(48)], 48)
        await self._freeze(watch)
        return 3

    async def _bad_key(self) -> None:
        thief = Client(self.cluster.url, self.client.model, "another-key")
        await thief.refused()
        self.client.log.refused += thief.log.refused
        await thief.api.close()

    async def _leave_unanswered(self) -> None:
        """A client hangs up before its first token: prefill stands still meanwhile."""
        self._send("prefill", signal.SIGSTOP)
        asked = asyncio.create_task(self.client.whole(self.ids(40), 4))
        async with asyncio.timeout(30):
            while not total([await fetch(self.urls["router-0"])], "splitserve_requests"):
                pass
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        self._send("prefill", signal.SIGCONT)

    async def _freeze(self, watch: Watch) -> None:
        """Decode stands still now and again while prompts are read, until handles were seen that wait under a lease."""
        enough = asyncio.Event()

        async def ask() -> None:
            while not enough.is_set():
                await self.client.whole(self.ids(150), 4)

        def seen() -> bool:
            prefill, router = watch.highest["prefill-0"], watch.highest["router-0"]
            return bool(total([prefill], "splitserve_kv_leases")) and bool(
                total([router], "splitserve_requests", state="transferring")
            )

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        for _ in range(10):
            self._send("decode", signal.SIGSTOP)
            await asyncio.sleep(FREEZE_S)
            self._send("decode", signal.SIGCONT)
            if seen():
                break
        enough.set()
        await asyncio.gather(*asking)

    def _send(self, role: str, number: int) -> None:
        for name in self.cluster.names(role):
            self.cluster.send(name, number)

    async def killed(self) -> None:
        """A decode worker dies under four answers and comes again under its name."""
        begun = asyncio.Semaphore(0)
        answers = [asyncio.create_task(self.client.stream(f"Song {n}: the sea", 32, begun)) for n in range(4)]
        for _ in answers:
            await begun.acquire()
        self.cluster.send("decode-0", signal.SIGKILL)
        await asyncio.gather(*answers)
        await self.cluster.everybody_ready()
        self.urls.update(await _urls(self.cluster))

    def take_log(self) -> ClientLog:
        log, self.client.log = self.client.log, ClientLog()
        return log


async def _urls(cluster: Cluster) -> dict[str, str]:
    urls = {who: beat.metrics_url for who, beat in (await cluster.workers()).items() if beat.metrics_url}
    return {**urls, FLEET: f"{cluster.url}/metrics"}


async def tell(cluster: Cluster) -> Story:
    """The whole load, part by part."""
    teller = await Teller.of(cluster)
    async with watching(lambda: teller.urls, steady=FLEET) as watch:
        pages = [await teller.pages()]
        parts: list[Part] = []
        left = 0
        for part in (teller.streams, teller.mixed, partial(teller.rough, watch), teller.killed):
            left += await part() or 0
            pages.append(await teller.pages())
            parts.append(Part(teller.take_log(), pages[-2], pages[-1]))
        async with httpx.AsyncClient(timeout=10) as http:
            texts = {who: (await http.get(url)).content for who, url in teller.urls.items()}
    await teller.client.api.close()
    for who, text in texts.items():
        watch.saw(who, text.decode(), steady=who == FLEET)
    return Story(pages[0], *parts, left=left, watch=watch, texts=texts)


def told(folder: Path, model: Path) -> Story:
    """Start the cluster, drive the load, stop it."""
    with running(folder, *FLAGS, model=model) as cluster:
        return asyncio.run(tell(cluster))
