"""NATS and Redis that go away under a running cluster, and come back or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
from openai import AsyncOpenAI

from support.cluster import Cluster
from support.streams import PROMPTS, SEEDS, Heard, listen
from support.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.slow]

TOKENS = 40


@pytest.fixture(scope="module")
def heard_once() -> list[Heard]:
    """What `undisturbed` heard: a seed has one answer, so once is enough."""
    return []


@pytest.fixture
async def undisturbed(small: Cluster, heard_once: list[Heard]) -> list[str]:
    """The texts of four streams when nothing happens."""
    if not heard_once:
        async with AsyncOpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            streams = (listen(client, small.model, p, tokens=TOKENS, seed=SEEDS[n]) for n, p in enumerate(PROMPTS[:4]))
            heard_once.extend(await asyncio.gather(*streams))
    return [one.text for one in heard_once]


async def streams_through(cluster: Cluster, client: AsyncOpenAI, outage: Callable[[], Awaitable[None]]) -> list[str]:
    """The texts of the four streams when the outage comes once all of them have begun."""
    heard = [Heard() for _ in PROMPTS[:4]]
    running_streams = [
        asyncio.create_task(listen(client, cluster.model, PROMPTS[n], tokens=TOKENS, seed=SEEDS[n], heard=heard[n]))
        for n in range(len(heard))
    ]
    await until(lambda: all(one.events >= 3 for one in heard), "the beginning of every stream", 60)
    await outage()
    await asyncio.gather(*running_streams)
    return [one.text for one in heard]


async def test_streams_outlive_a_restart_of_nats(small: Cluster, undisturbed: list[str]) -> None:
    async def outage() -> None:
        small.nats.kill()
        await asyncio.sleep(2)
        small.nats.start()

    async with AsyncOpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        assert await streams_through(small, client, outage) == undisturbed


async def test_streams_do_not_notice_a_redis_that_is_gone_and_new_requests_are_served(
    small: Cluster, undisturbed: list[str]
) -> None:
    async def outage() -> None:
        small.redis.kill()

    async with AsyncOpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        assert await streams_through(small, client, outage) == undisturbed
        answer = await client.completions.create(model=small.model, prompt="Still here:", max_tokens=4)
        assert answer.choices[0].text
        async with httpx.AsyncClient(base_url=small.url) as http:
            assert (await http.get("/ready")).status_code == 200
            page = (await http.get("/metrics")).text
        assert "splitserve_state_degraded{" in page
        degraded = next(line for line in page.splitlines() if line.startswith("splitserve_state_degraded{"))
        assert degraded.endswith(" 1.0")
        small.redis.start()


async def test_without_nats_new_requests_are_refused_at_once_and_the_old_ones_end(small: Cluster) -> None:
    async with AsyncOpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        heard = Heard()
        stream = asyncio.create_task(listen(client, small.model, "An endless tale:", tokens=1000, seed=1, heard=heard))
        await until(lambda: heard.events >= 3, "the beginning of the stream", 60)
        small.nats.kill()
        await asyncio.sleep(1)
        async with httpx.AsyncClient(base_url=small.url, timeout=10) as http:
            refused = await http.post("/v1/completions", json={"model": small.model, "prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "bus_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        with pytest.raises(Exception, match="bus"):
            await asyncio.wait_for(stream, 40)
        small.nats.start()
        await small.everybody_ready()
