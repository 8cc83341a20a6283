"""A cheap client for what is not measured by the client's clock: fresh prompts of random tokens, answered in one piece."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.peers import NAME

_TIMEOUT_S = 300.0
_ORDINARY = range(1000, 40_000)  # ids of ordinary text in the default model's vocabulary


def prompts(rng: random.Random, count: int, tokens: int) -> list[list[int]]:
    """No two of them begin alike, so none is found cached."""
    return [rng.choices(_ORDINARY, k=tokens) for _ in range(count)]


def ask(url: str, asked: Sequence[Sequence[int]], max_tokens: int, at_a_time: int) -> list[dict[str, Any]]:
    """The answer to each prompt. RuntimeError when one was not answered with 200."""
    return asyncio.run(_ask(url, asked, max_tokens, at_a_time))


async def _ask(url: str, asked: Sequence[Sequence[int]], max_tokens: int, at_a_time: int) -> list[dict[str, Any]]:
    room = asyncio.Semaphore(at_a_time)
    limits = httpx.Limits(max_connections=at_a_time, max_keepalive_connections=at_a_time)
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, limits=limits) as client:

        async def one(prompt: Sequence[int]) -> dict[str, Any]:
            fields = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
            async with room:
                answer = await client.post(f"{url}/v1/completions", json=fields | {"include_stage_seconds": True})
            if not answer.is_success:
                raise RuntimeError(f"{url} answered {answer.status_code}: {answer.text[:300]}")
            return answer.json()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(prompt)) for prompt in asked]
    return [task.result() for task in tasks]


def samples(url: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Labels and value of each sample called `name` on the joined metrics page."""
    page = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    families = text_string_to_metric_families(page)
    return [(dict(s.labels), s.value) for family in families for s in family.samples if s.name == name]
