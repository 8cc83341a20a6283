"""The stack of docker-compose.yml on a real engine: started, used, scaled, hurt, asked for its metrics, stopped."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import subprocess
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from support.stack import Stack, docker, engine_missing, running_stack
from support.waiting import until

WHY_NOT = engine_missing()
pytestmark = [
    pytest.mark.compose,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(WHY_NOT), reason=f"the compose stack was not run: {WHY_NOT}"),
]

MODEL = "SmolLM2-135M-Instruct"
TOKENS = 32
PATIENCE_S = 300.0  # two cores may be shared with a build
SCRAPED_S = 60.0  # two scrapes, 10 s, on a machine that has nothing else to do


@pytest.fixture(scope="session")
def network() -> Generator[str, None, None]:
    name = f"splitserve-test-{secrets.token_hex(3)}"
    docker("network", "create", name)
    yield name
    docker("network", "rm", name)


@pytest.fixture(scope="session")
def started(network: str, tmp_path_factory: pytest.TempPathFactory) -> Generator[Stack, None, None]:
    with running_stack(tmp_path_factory.mktemp("stack"), f"ss{secrets.token_hex(3)}", network) as stack:
        yield stack
    assert stack.left() == {}


@pytest.fixture
def stack(started: Stack) -> Generator[Stack, None, None]:
    """One of each phase; what a test scaled or killed is mended afterwards."""
    yield started
    started.scale(prefill=1, decode=1)


def client_of(stack: Stack) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=180)


@dataclass
class Load:
    """What clients saw: streams that came whole, and the errors of the others."""

    whole: int = 0
    failed: list[str] = field(default_factory=list[str])


@asynccontextmanager
async def load_on(stack: Stack, clients: int = 3) -> AsyncGenerator[Load, None]:
    """Streams one after the other from each client, while the block runs; those under way are heard to their end."""
    load, stop, numbers = Load(), asyncio.Event(), itertools.count()

    async def talk(client: AsyncOpenAI) -> None:
        while not stop.is_set():
            try:
                tokens = await streamed(client, f"{next(numbers)}. Tell me about rivers and the sea. " * 6)
            except Exception as error:  # noqa: BLE001  # what failed is what the test is about
                load.failed.append(repr(error))
                return
            load.whole += tokens == TOKENS
            if tokens != TOKENS:
                load.failed.append(f"{tokens} of {TOKENS} tokens")

    async with client_of(stack) as client:
        talks = [asyncio.create_task(talk(client)) for _ in range(clients)]
        try:
            await until(lambda: load.whole >= clients or bool(load.failed), "the first streams", PATIENCE_S)
            yield load
        finally:
            stop.set()
            await asyncio.gather(*talks)


async def streamed(client: AsyncOpenAI, prompt: str) -> int:
    """Stream one answer of `TOKENS` tokens; how many the server says it had."""
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    counted = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    return counted[-1]


async def eventually(stack: Stack, wanted: dict[str, int], within_s: float) -> None:
    """Wait until Prometheus has that many live targets of each job."""

    def come() -> bool:
        return {job: count for job, count in stack.up_targets().items() if job in wanted} == wanted

    try:
        await until(come, f"targets {wanted}", within_s)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; there are {stack.up_targets()}") from error


@pytest.mark.parametrize("more", ["", "docker-compose.federation.yml", "docker-compose.gpu.yml"])
def test_compose_takes_the_files(stack: Stack, more: str) -> None:
    files = ":".join(filter(None, ["docker-compose.yml", more]))
    Stack(stack.name, {**stack.environ, "COMPOSE_FILE": files}).compose("config", "--quiet")


def test_prometheus_takes_its_configuration_and_rules(stack: Stack) -> None:
    for service in ("prometheus", "prometheus-federation"):
        said = stack.compose("exec", "-T", service, "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
        assert "SUCCESS" in said


async def test_an_answer_comes_through_the_published_port(stack: Stack) -> None:
    async with client_of(stack) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Say hello."}], max_tokens=8
        )
        assert answer.choices[0].message.content
        assert await streamed(client, "Count to ten.") == TOKENS


def test_nothing_but_the_router_and_prometheus_is_published(stack: Stack) -> None:
    assert stack.published() == {"router", "prometheus", "prometheus-federation"}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_worker_is_nobody_special_and_has_no_way_to_redis_or_the_world(stack: Stack, phase: str) -> None:
    assert stack.compose("exec", "-T", phase, "id", "-u").strip() == "10001"
    for host in ("redis", "prometheus-federation.invalid"):
        with pytest.raises(RuntimeError, match=r"Name or service not known|Temporary failure in name resolution"):
            stack.compose("exec", "-T", phase, "python", "-c", f"import socket; socket.getaddrinfo('{host}', 6379)")
    with pytest.raises(RuntimeError, match=r"timed out|Network is unreachable"):
        stack.compose(
            "exec", "-T", phase, "python", "-c", "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
        )


def test_kv_passes_between_containers_through_shared_memory_and_the_log_says_so(stack: Stack) -> None:
    chosen = [line for line in stack.logs("decode").splitlines() if "kv transport chosen" in line]
    assert chosen
    assert json.loads(chosen[-1].partition("{")[1] + chosen[-1].partition("{")[2])["transport"] == "shm"


async def test_both_phases_scale_under_load_and_no_request_fails(stack: Stack) -> None:
    async with load_on(stack) as load:
        await asyncio.to_thread(stack.scale, prefill=3, decode=2)
        await until(
            lambda: all("healthy" in health for health in _health(stack)), "health of the new workers", PATIENCE_S
        )
        await eventually(stack, {"prefill": 3, "decode": 2, "router": 1}, SCRAPED_S)
        before = load.whole
        await until(lambda: load.whole >= before + 6 or bool(load.failed), "streams over all workers", PATIENCE_S)
        await asyncio.to_thread(stack.scale, prefill=1, decode=1)
        await eventually(stack, {"prefill": 1, "decode": 1, "router": 1}, SCRAPED_S)
        before = load.whole
        await until(lambda: load.whole >= before + 3 or bool(load.failed), "streams over the rest", PATIENCE_S)
    assert load.failed == []


def _health(stack: Stack) -> list[str]:
    ids = [*stack.containers("prefill"), *stack.containers("decode")]
    return docker("inspect", "--format", "{{.State.Health.Status}}", *ids).split()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_killed_container_costs_no_answer(stack: Stack, phase: str) -> None:
    await asyncio.to_thread(stack.scale, prefill=2, decode=2)
    await until(lambda: all(health == "healthy" for health in _health(stack)), "health of the workers", PATIENCE_S)
    victim = stack.containers(phase)[0]
    async with load_on(stack) as load:
        docker("kill", victim)
        before = load.whole
        await until(lambda: load.whole >= before + 6 or bool(load.failed), "streams without it", PATIENCE_S)
    assert load.failed == []
    docker("start", victim)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_container_that_is_told_to_stop_drains_and_ends_with_zero(stack: Stack, phase: str) -> None:
    await asyncio.to_thread(stack.scale, prefill=2, decode=2)
    await until(lambda: all(health == "healthy" for health in _health(stack)), "health of the workers", PATIENCE_S)
    victim = stack.containers(phase)[0]
    async with load_on(stack) as load:
        await asyncio.to_thread(docker, "stop", "--time", "70", victim)
    assert load.failed == []
    assert docker("inspect", "--format", "{{.State.ExitCode}}", victim).strip() == "0"
    said = subprocess.run(["docker", "logs", victim], capture_output=True, text=True, check=True).stderr
    assert "draining" in said
    assert "left before everything had ended" not in said
    docker("start", victim)


async def test_prometheus_counts_what_was_answered_once(stack: Stack) -> None:
    await eventually(stack, {"prefill": 1, "decode": 1, "router": 1}, SCRAPED_S)
    tokens = "sum(vllm:generation_tokens_total)"
    now = time.time()
    scraped = "min(timestamp(vllm:generation_tokens_total))"  # what was asked before this test counts as before
    await until(lambda: min(stack.query(scraped).values(), default=0) > now, "a scrape of now", SCRAPED_S)
    before = sum(stack.query(tokens).values())
    async with client_of(stack) as client:
        await streamed(client, "How deep is the sea?")
    await until(lambda: sum(stack.query(tokens).values()) >= before + TOKENS, "the tokens in a scrape", SCRAPED_S)
    assert sum(stack.query(tokens).values()) == before + TOKENS
    assert stack.query('vllm:kv_cache_usage_perc{job="decode"}')
    assert stack.query('vllm:prefix_cache_queries_total{job="prefill"}')


async def test_two_stacks_are_seen_by_either_federating_prometheus(stack: Stack, network: str, tmp_path: Path) -> None:
    with running_stack(tmp_path, f"ss{secrets.token_hex(3)}", network, KV_TRANSPORT="tcp") as second:
        async with client_of(second) as client:
            await streamed(client, "Is there anybody?")
        both = {stack.name, second.name}

        def seen(by: Stack) -> set[str]:
            up = by.query('count by (stack) (up{job=~"router|prefill|decode"} == 1)', federation=True)
            return {dict(labels)["stack"] for labels, count in up.items() if count == 3}

        for federation in (stack, second):
            await until(lambda federation=federation: seen(federation) == both, f"both at {federation.name}", 60)
        ours = stack.query("sum by (stack) (vllm:generation_tokens_total)", federation=True)
        assert {dict(labels)["stack"] for labels in ours} == both
        assert '"transport": "tcp"' in second.logs("decode")
    assert second.left() == {}
    assert stack.containers("router")
