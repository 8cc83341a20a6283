"""Workers that are asked to leave under running streams, and are not given the time to finish them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from support.cluster import Cluster, gone, running
from support.streams import PROMPTS, SEEDS, Heard, listen
from support.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.slow]

TOKENS = 48  # as many as SEEDS are good for
FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "256MiB", "--log-format", "text", "--split", "always")


@pytest.fixture(scope="module")
def hasty(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster, None, None]:
    """Two of each phase, whose workers leave a fifth of a second after they were asked to."""
    flags = (*FLAGS, "--prefill", "2", "--decode", "2", "--drain-timeout", "0.2")
    with running(tmp_path_factory.mktemp("hasty"), *flags, model=smollm2_folder) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed() -> list[Heard]:
    """What the first test heard while nothing happened: a seed has one answer, so once is enough."""
    return []


@pytest.mark.parametrize("leaving", ["decode-0", "prefill-0"])
async def test_past_the_drain_timeout_requests_move_and_no_token_is_lost_or_changed(
    hasty: Cluster, undisturbed: list[Heard], leaving: str
) -> None:
    await hasty.everybody_ready()
    async with AsyncOpenAI(base_url=f"{hasty.url}/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def streams(heard: list[Heard]) -> None:
            await asyncio.gather(
                *(
                    listen(client, hasty.model, prompt, tokens=TOKENS, seed=SEEDS[n], heard=heard[n])
                    for n, prompt in enumerate(PROMPTS)
                )
            )

        if not undisturbed:
            await streams(expected := [Heard() for _ in PROMPTS])
            undisturbed.extend(expected)
        heard = [Heard() for _ in PROMPTS]
        listening = asyncio.create_task(streams(heard))
        await until(lambda: all(one.events >= 3 for one in heard), "the beginning of every stream", 60)
        pid = hasty.pid(leaving)
        os.kill(pid, signal.SIGTERM)
        await gone([pid])
        assert not listening.done(), "every stream had ended before the worker left: nothing was moved"
        await listening
    assert [one.text for one in heard] == [one.text for one in undisturbed]
    assert {one.finish for one in heard} == {"length"}
    assert "Traceback" not in hasty.log.read_text()
    await hasty.everybody_ready()
    await hasty.nothing_held()
