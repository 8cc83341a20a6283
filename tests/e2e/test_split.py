"""The decode worker does not read the prompt; what moves is exactly the blocks."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from openai import AsyncOpenAI
from redis.asyncio import Redis

from support.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.model]


async def test_decode_computes_no_prompt_and_what_moves_is_blocks_times_block_size(
    pair: Cluster, client: AsyncOpenAI
) -> None:
    names = (
        "splitserve_prefill_tokens_total",
        "splitserve_kv_transfer_bytes_total",
        "splitserve_kv_transfer_blocks_total",
    )
    before = {(role, name): await pair.total(name, role) for role in ("prefill", "decode") for name in names}
    answer = await client.completions.create(
        model=pair.model, prompt="A prompt that nobody sent before: zebra, quilt, " * 30, max_tokens=8, temperature=0
    )
    after = {key: await pair.total(key[1], key[0]) for key in before}
    moved = {key: after[key] - before[key] for key in before}
    assert answer.usage
    prompt = answer.usage.prompt_tokens
    blocks = -(-prompt // 16)
    bytes_per_token = 30 * 2 * 3 * 64 * 4  # layers x (K, V) x heads x dimension x float32
    assert moved["prefill", "splitserve_prefill_tokens_total"] == prompt
    assert moved["decode", "splitserve_prefill_tokens_total"] == 0
    assert moved["decode", "splitserve_kv_transfer_blocks_total"] == blocks
    assert moved["decode", "splitserve_kv_transfer_bytes_total"] == blocks * 16 * bytes_per_token


async def test_a_prompt_of_several_chunks_comes_in_parts_each_block_once_and_whole(
    pair: Cluster, client: AsyncOpenAI
) -> None:
    names = ("splitserve_kv_transfer_blocks_total", "splitserve_kv_transfer_seconds_count")
    text = "Nobody sent this long text before: walrus, anvil, " * 120

    async def answer(prompt: str, tokens: int) -> str:
        got = await client.completions.create(model=pair.model, prompt=prompt, max_tokens=tokens, temperature=0)
        assert got.usage
        assert got.usage.prompt_tokens > 1024  # two chunks and more
        lengths.append(got.usage.prompt_tokens)
        return got.choices[0].text

    lengths: list[int] = []
    before = [await pair.total(name, "decode") for name in names]
    eight = await answer(text, 8)
    blocks, copies = [await pair.total(name, "decode") - old for name, old in zip(names, before, strict=True)]
    assert blocks == -(-lengths[0] // 16)
    assert copies > 1
    four = await answer(text, 4)
    fifth = await answer(text + four, 1)  # the prefill worker's own, of the KV that it had sent
    assert eight.startswith(four + fifth)


async def test_a_requests_record_names_its_workers_and_stages_and_never_its_content(
    pair: Cluster, client: AsyncOpenAI
) -> None:
    answer = await client.chat.completions.create(
        model=pair.model, messages=[{"role": "user", "content": "Say xylophone."}], max_tokens=6
    )
    async with httpx.AsyncClient(base_url=pair.url) as http:
        got = await http.get(f"/v1/requests/{answer.id}")
    record = got.json()
    assert record["state"] == "finished"
    assert record["prefill_worker"].startswith("prefill-")
    assert record["decode_worker"].startswith("decode-")
    assert (record["attempts_prefill"], record["attempts_decode"]) == (1, 1)
    assert answer.usage
    assert record["prompt_tokens"] == answer.usage.prompt_tokens
    assert record["completion_tokens"] == answer.usage.completion_tokens
    assert record["stages_s"]["prefill"] > 0
    assert record["stages_s"]["transfer"] > 0
    assert "xylophone" not in got.text


async def test_a_finished_request_is_still_known_from_redis(pair: Cluster, client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=pair.model, prompt="one two three", max_tokens=3)
    redis = Redis.from_url(pair.redis.url, decode_responses=True)
    try:
        fields: dict[str, str] = {}
        async with asyncio.timeout(5):  # the group commit comes 20 ms later
            while fields.get("state") != "finished":
                found = await redis.hgetall(f"ss:default:req:{answer.id}")
                fields = {str(key): str(value) for key, value in found.items()}
        age = await redis.ttl(f"ss:default:req:{answer.id}")
    finally:
        await redis.aclose()
    assert 0 < age <= 600
