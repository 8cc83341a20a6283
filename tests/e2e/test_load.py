"""Many at once, too much, too long, too slow, and gone."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest
from openai import AsyncOpenAI

from support.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.model]

SMALL_POOL = (64 << 20) // (30 * 2 * 3 * 64 * 4)  # tokens: of layers x (K, V) x heads x dimension x float32


async def test_a_hundred_requests_at_once_are_all_answered(pair: Cluster, client: AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(
            client.completions.create(
                model=pair.model, prompt=f"Story {n}:", max_tokens=8, extra_body={"ignore_eos": True}
            )
            for n in range(100)
        )
    )
    assert [answer.choices[0].finish_reason for answer in answers] == ["length"] * 100
    assert all(answer.usage and answer.usage.completion_tokens == 8 for answer in answers)


async def test_more_than_the_pool_holds_waits_and_is_answered(small: Cluster) -> None:
    long = "Many words fill many blocks of the pool. " * 20
    async with AsyncOpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model=small.model, prompt=f"{n}: {long}", max_tokens=32, extra_body={"ignore_eos": True}
                )
                for n in range(16)
            )
        )
    usages = [answer.usage for answer in answers if answer.usage]
    assert [usage.completion_tokens for usage in usages] == [32] * 16
    assert sum(usage.total_tokens for usage in usages) > 2 * SMALL_POOL


async def test_a_prompt_of_a_million_characters_is_refused_while_health_answers(pair: Cluster) -> None:
    body = json.dumps({"model": pair.model, "prompt": "word " * 200_000, "max_tokens": 5})
    async with httpx.AsyncClient(base_url=pair.url, timeout=30) as http:
        refused = asyncio.create_task(
            http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        )
        began = time.monotonic()
        assert (await http.get("/health")).status_code == 200
        assert time.monotonic() - began < 5
        answer = await refused
    assert answer.status_code == 400
    assert "this model's maximum context length is" in answer.json()["error"]["message"]


async def test_a_body_over_the_limit_is_413(pair: Cluster) -> None:
    async with httpx.AsyncClient(base_url=pair.url, timeout=30) as http:
        answer = await http.post("/v1/completions", content=b"x" * (9 << 20))
    assert answer.status_code == 413


async def open_stream(pair: Cluster, tokens: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body = json.dumps(
        {"model": pair.model, "prompt": "A very long story:", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    ).encode()
    host, port = pair.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()
    return reader, writer


async def test_a_client_that_stops_reading_holds_up_nobody_and_its_work_ends(
    pair: Cluster, client: AsyncOpenAI
) -> None:
    _, writer = await open_stream(pair, 40)
    try:
        began = time.monotonic()
        await client.completions.create(model=pair.model, prompt="Short:", max_tokens=4)
        assert time.monotonic() - began < 30
        # decode is not held back by the reader: its blocks are free before the client has read a word
        await pair.nothing_held(60)
    finally:
        writer.close()


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_work(pair: Cluster, after_s: float, stream: bool) -> None:
    before = await pair.total("splitserve_decode_tokens_total", "decode")
    body = {
        "model": pair.model,
        "prompt": f"Leaving after {after_s} {stream}. " * 40,
        "max_tokens": 1500,
        "stream": stream,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(base_url=pair.url, timeout=60) as http:
        task = asyncio.create_task(http.post("/v1/completions", json=body))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await pair.nothing_held(15)
    after = await pair.total("splitserve_decode_tokens_total", "decode")
    assert after - before < 1000
