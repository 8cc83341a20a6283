"""Reading metrics pages while something happens: sums, the highest value of each series, counters that fell."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

import httpx
from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
Page = dict[tuple[str, Labels], float]
_GROWING = ("counter", "histogram", "summary")


def read(text: str) -> tuple[Page, set[str]]:
    """Samples of a page by name and labels, and the names of those that may only grow."""
    page: Page = {}
    growing: set[str] = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            page[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
            if family.type in _GROWING:
                growing.add(sample.name)
    return page, growing


async def fetch(url: str) -> Page:
    async with httpx.AsyncClient(timeout=10) as http:
        return read((await http.get(url)).raise_for_status().text)[0]


def total(pages: Iterable[Page], name: str, **labels: str) -> float:
    """Sum of a sample over pages, of the series with these labels."""
    wanted = set(labels.items())
    return sum(v for page in pages for (n, found), v in page.items() if n == name and wanted <= set(found))


def quantile_bucket(before: Page, after: Page, family: str, q: float) -> int:
    """Which bucket of a histogram, counted from 0, the quantile `q` of what came between two pages lies in."""
    counts: dict[float, float] = defaultdict(float)
    for (name, labels), value in after.items():
        if name == f"{family}_bucket":
            counts[float(dict(labels)["le"])] += value - before.get((name, labels), 0.0)
    bounds = sorted(counts)
    need = q * counts[bounds[-1]]
    return next(n for n, bound in enumerate(bounds) if counts[bound] >= need)


def bucket_of(values: list[float], bounds: tuple[float, ...], q: float) -> int:
    """Which bucket the quantile `q` of raw values lies in."""
    ranked = sorted(values)
    return bisect_left(bounds, ranked[max(0, -(-int(q * 1000) * len(ranked) // 1000) - 1)])


class Watch:
    """`highest[process][series]`, and `fell`: counters of the pages in `steady` that were less than before."""

    def __init__(self) -> None:
        self.highest: dict[str, Page] = defaultdict(dict)
        self.fell: list[str] = []
        self.reads: dict[str, int] = defaultdict(int)
        self._last: dict[str, Page] = {}

    def saw(self, who: str, text: str, *, steady: bool) -> None:
        page, growing = read(text)
        self.reads[who] += 1
        highest = self.highest[who]
        for series, value in page.items():
            highest[series] = max(value, highest.get(series, value))
        if steady:
            for series, before in self._last.get(who, {}).items():
                if series[0] in growing and page.get(series, 0.0) < before:
                    self.fell.append(f"{who} {series}: {before} -> {page.get(series)}")
            self._last[who] = page

    def all(self) -> Mapping[str, Page]:
        return self.highest


@asynccontextmanager
async def watching(urls: Callable[[], Mapping[str, str]], steady: str, every_s: float = 0.1) -> AsyncGenerator[Watch]:
    """Read the pages of `urls()` (process -> URL) again and again while the block runs; a process that is away is passed
    over. Counters of the page named `steady` may not fall."""
    watch = Watch()

    async def look(who: str) -> None:
        async with httpx.AsyncClient(timeout=5) as http:
            while True:
                try:
                    answer = await http.get(urls()[who])
                    watch.saw(who, answer.raise_for_status().text, steady=who == steady)
                except httpx.TransportError:
                    pass  # it dies and comes again in this load
                await asyncio.sleep(every_s)

    tasks = [asyncio.create_task(look(who), name=f"watch {who}") for who in urls()]
    try:
        yield watch
    finally:
        for task in tasks:
            task.cancel()
        faults = [f for f in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(f, Exception)]
        assert not faults, faults
