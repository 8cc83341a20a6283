"""NATS and Redis that go away under a running cluster, and come back or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from support.cluster import Cluster, running
from support.streams import PROMPTS, SEEDS, Heard, listen
from support.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.slow]

FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "128MiB", "--split", "always")


@pytest.fixture
def cluster(smollm2_folder: Path, tmp_path: Path):
    with running(tmp_path, *FLAGS, model=smollm2_folder) as made:
        yield made


async def streams_through(
    cluster: Cluster, client: AsyncOpenAI, outage: Callable[[], Awaitable[None]]
) -> tuple[list[str], list[Heard]]:
    expected = [
        (await listen(client, cluster.model, p, tokens=40, seed=SEEDS[n])).text for n, p in enumerate(PROMPTS[:4])
    ]
    heard = [Heard() for _ in expected]
    running_streams = [
        asyncio.create_task(listen(client, cluster.model, PROMPTS[n], tokens=40, seed=SEEDS[n], heard=heard[n]))
        for n in range(len(expected))
    ]
    await until(lambda: all(one.events >= 3 for one in heard), "the beginning of every stream", 60)
    await outage()
    await asyncio.gather(*running_streams)
    return expected, heard


async def test_streams_outlive_a_restart_of_nats(cluster: Cluster) -> None:
    async def outage() -> None:
        cluster.nats.kill()
        await asyncio.sleep(2)
        cluster.nats.start()

    async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        expected, heard = await streams_through(cluster, client, outage)
    assert [one.text for one in heard] == expected


async def test_streams_do_not_notice_a_redis_that_is_gone_and_new_requests_are_served(cluster: Cluster) -> None:
    async def outage() -> None:
        cluster.redis.kill()

    async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        expected, heard = await streams_through(cluster, client, outage)
        assert [one.text for one in heard] == expected
        answer = await client.completions.create(model=cluster.model, prompt="Still here:", max_tokens=4)
        assert answer.choices[0].text
        async with httpx.AsyncClient(base_url=cluster.url) as http:
            assert (await http.get("/ready")).status_code == 200
            page = (await http.get("/metrics")).text
        assert "splitserve_state_degraded{" in page
        degraded = next(line for line in page.splitlines() if line.startswith("splitserve_state_degraded{"))
        assert degraded.endswith(" 1.0")
        cluster.redis.start()


async def test_without_nats_new_requests_are_refused_at_once_and_the_old_ones_end(cluster: Cluster) -> None:
    async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        heard = Heard()
        stream = asyncio.create_task(
            listen(client, cluster.model, "An endless tale:", tokens=1500, seed=1, heard=heard)
        )
        await until(lambda: heard.events >= 3, "the beginning of the stream", 60)
        cluster.nats.kill()
        await asyncio.sleep(1)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=10) as http:
            refused = await http.post("/v1/completions", json={"model": cluster.model, "prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "bus_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        with pytest.raises(Exception, match="bus"):
            await asyncio.wait_for(stream, 40)
        cluster.nats.start()
        await cluster.everybody_ready()
