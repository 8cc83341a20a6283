"""A real Prometheus in tests (Debian package `prometheus`), with the project's recording rules and alerts."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from support.promql import RULES
from support.servers import Server, free_port

INTERVAL = "1s"


@dataclass(frozen=True, slots=True)
class Answer:
    """One query's: `problem` is what Prometheus complained of, `values` those of all series that are numbers."""

    query: str
    problem: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Prometheus:
    url: str

    async def ask(self, query: str) -> Answer:
        async with httpx.AsyncClient(timeout=20) as http:
            said = (await http.get(f"{self.url}/api/v1/query", params={"query": query})).json()
        if said["status"] != "success":
            return Answer(query, said["error"], ())
        values = (float(series["value"][1]) for series in said["data"]["result"])
        return Answer(query, "", tuple(value for value in values if not math.isnan(value)))

    async def until_all(self, query: str, count: int, within_s: float = 30) -> None:
        """Wait until `query` gives at least `count` numbers. TimeoutError with the last answer."""
        give_up = asyncio.get_running_loop().time() + within_s
        while len((answer := await self.ask(query)).values) < count:
            if asyncio.get_running_loop().time() > give_up:
                raise TimeoutError(f"not {count} values in {within_s:g} s: {answer}")
            await asyncio.sleep(0.2)


def _config(folder: Path, pages: Mapping[str, tuple[str, list[str]]]) -> str:
    rules = folder / "rules"
    rules.mkdir()
    for path in RULES.glob("*.yml"):
        told = yaml.safe_load(path.read_text())
        for group in told["groups"]:
            group["interval"] = INTERVAL
        (rules / path.name).write_text(yaml.safe_dump(told, sort_keys=False))
    jobs = [
        {"job_name": job, "metrics_path": path, "static_configs": [{"targets": targets}]}
        for job, (path, targets) in pages.items()
    ]
    every = {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL}
    return yaml.safe_dump({"global": every, "rule_files": [f"{rules}/*.yml"], "scrape_configs": jobs})


@contextmanager
def scraping(folder: Path, pages: Mapping[str, tuple[str, list[str]]]) -> Generator[Prometheus, None, None]:
    """Prometheus over `pages`: by job, the path and the host:port of its targets. Skips where it is not installed."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (apt-get install prometheus)")
    config = folder / "prometheus.yml"
    config.write_text(_config(folder, pages))
    port = free_port()
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    server = Server(command, port, f"http://127.0.0.1:{port}", ready="/-/ready")
    server.start()
    try:
        yield Prometheus(server.url)
    finally:
        server.kill()
