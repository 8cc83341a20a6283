"""Workers that die, freeze and lie under running streams: every answer equals the undisturbed one (float32)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from support.cluster import Cluster, running
from support.streams import PROMPTS, SEEDS, Heard, listen
from support.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.slow]

TOKENS = 48


async def disturbed(client: AsyncOpenAI, cluster: Cluster, fault: Callable[[], Awaitable[None]]) -> list[Heard]:
    """Eight streams; the fault strikes once each has begun but none is near its end."""
    heard = [Heard() for _ in PROMPTS]
    streams = [
        asyncio.create_task(listen(client, cluster.model, p, tokens=TOKENS, seed=SEEDS[n], heard=heard[n]))
        for n, p in enumerate(PROMPTS)
    ]
    await until(lambda: all(one.events >= 3 for one in heard), "the beginning of every stream", 60)
    await fault()
    await asyncio.gather(*streams)
    print(f"longest gap: {max(one.longest_gap_s for one in heard):.2f} s")
    return heard


@pytest.fixture
async def client4(four: Cluster):
    async with AsyncOpenAI(base_url=f"{four.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def heard_once() -> list[Heard]:
    """What `undisturbed` heard: a seed has one answer, so once is enough."""
    return []


@pytest.fixture
async def undisturbed(four: Cluster, client4: AsyncOpenAI, heard_once: list[Heard]) -> list[str]:
    """The texts of the eight streams when nothing happens."""
    if not heard_once:
        streams = (listen(client4, four.model, p, tokens=TOKENS, seed=SEEDS[n]) for n, p in enumerate(PROMPTS))
        heard_once.extend(await asyncio.gather(*streams))
    return [one.text for one in heard_once]


@pytest.mark.parametrize("victim", ["decode-0", "decode-1", "prefill-0"])
async def test_a_killed_worker_gives_its_requests_to_another_and_no_token_is_lost_or_changed(
    four: Cluster, client4: AsyncOpenAI, undisturbed: list[str], victim: str
) -> None:
    async def kill() -> None:
        four.send(victim, signal.SIGKILL)

    heard = await disturbed(client4, four, kill)
    assert [one.text for one in heard] == undisturbed
    assert {one.finish for one in heard} == {"length"}


async def test_a_worker_killed_while_prompts_are_being_read_costs_no_request(
    four: Cluster, client4: AsyncOpenAI
) -> None:
    prompts = [f"Fresh Number {n}. {'The quick brown fox jumps over the lazy dog. ' * 40}" for n in range(6)]
    wanted = asyncio.gather(*(listen(client4, four.model, p, tokens=6, seed=n) for n, p in enumerate(prompts)))
    await asyncio.sleep(0.3)
    four.send("prefill-0", signal.SIGKILL)
    heard = await wanted
    assert all(one.finish == "length" for one in heard)
    again = [await listen(client4, four.model, p, tokens=6, seed=n) for n, p in enumerate(prompts)]
    assert [one.text for one in heard] == [one.text for one in again]


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_a_worker_frozen_past_the_lease_and_woken_changes_no_token(
    four: Cluster, client4: AsyncOpenAI, undisturbed: list[str], victim: str
) -> None:
    pid = four.pid(victim)

    async def freeze() -> None:
        four.send(victim, signal.SIGSTOP)
        await asyncio.sleep(6)  # the lease is 3 s
        four.send(victim, signal.SIGCONT)

    heard = await disturbed(client4, four, freeze)
    assert [one.text for one in heard] == undisturbed
    assert four.pid(victim) == pid


async def test_prompts_that_wait_are_read_by_a_worker_that_comes_back_while_they_wait(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    """In a cluster of its own: what a worker was seen to read in a second decides whether it would be through sooner."""
    flags = ("--dtype", "float32", "--split", "always", "--prefill", "2", "--kv-cache-memory-bytes", "512MiB")
    prompts = [f"Waiting Number {n}. {'The quick brown fox jumps over the lazy dog. ' * 120}" for n in range(5)]
    with running(tmp_path, *flags, model=smollm2_folder) as cluster:
        async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            cluster.send("prefill-1", signal.SIGSTOP)
            try:
                await asyncio.sleep(2.5)  # it is dead to the router
                asked = (listen(client, cluster.model, p, tokens=6, seed=n) for n, p in enumerate(prompts))
                wanted = asyncio.gather(*asked)
                await asyncio.sleep(0.5)
            finally:
                cluster.send("prefill-1", signal.SIGCONT)
            heard = await wanted
            assert all(one.finish == "length" for one in heard)
            assert await cluster.total("splitserve_replacements_total", "router", reason="moved") > 0
            again = [await listen(client, cluster.model, p, tokens=6, seed=n) for n, p in enumerate(prompts)]
        assert [one.text for one in heard] == [one.text for one in again]


async def test_a_bit_flipped_in_a_held_block_is_found_and_the_prompt_is_read_again(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    flags = ("--dtype", "float32", "--split", "always", "--kv-checksum", "all", "--kv-cache-memory-bytes", "64MiB")
    prompt = "Bits may rot in memory, " * 12
    # the readiness probe moves the first block of all: the fault waits for a later one
    with running(
        tmp_path, *flags, "--kv-transport", "shm", model=smollm2_folder, SPLITSERVE_FAULTS="kv.bitflip:4"
    ) as cluster:
        async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
            heard = [await listen(client, cluster.model, f"{n} {prompt}", tokens=8, seed=1) for n in range(4)]
            again = [await listen(client, cluster.model, f"{n} {prompt}", tokens=8, seed=1) for n in range(4)]
        assert [one.text for one in heard] == [one.text for one in again]
        failed = {
            labels: value
            for (name, labels), value in (await cluster.series())["decode-0"].items()
            if name == "splitserve_kv_failed_total" and dict(labels)["reason"] == "checksum"
        }
        assert sum(failed.values()) == 1
