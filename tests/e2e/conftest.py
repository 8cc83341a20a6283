"""Whole clusters, started as a user starts them. After each test nothing may be held."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from support.cluster import Cluster, running
from support.processes import environment

FLOAT32 = ("--dtype", "float32", "--kv-cache-memory-bytes", "256MiB", "--log-format", "text")


@pytest.fixture(scope="session")
def without_extra(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which OpenTelemetry's SDK is as good as not installed (its API comes with FastAPI)."""
    shadow = tmp_path_factory.mktemp("shadow")
    (shadow / "opentelemetry" / "sdk").mkdir(parents=True)
    (shadow / "opentelemetry" / "sdk" / "__init__.py").touch()
    return os.pathsep.join((str(shadow), environment()["PYTHONPATH"]))


@pytest.fixture(scope="session")
def running_pair(
    smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory, without_extra: str
) -> Generator[Cluster, None, None]:
    flags = (*FLOAT32, "--split", "always", "--kv-transport", "shm", "--queue-timeout", "120")
    with running(tmp_path_factory.mktemp("pair"), *flags, model=smollm2_folder, PYTHONPATH=without_extra) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def running_four(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster, None, None]:
    flags = (*FLOAT32, "--prefill", "2", "--decode", "2", "--split", "always", "--kv-transport", "tcp")
    flags = (*flags, "--kv-checksum", "all", "--kv-lease-ttl", "3")
    with running(tmp_path_factory.mktemp("four"), *flags, model=smollm2_folder) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def running_small(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster, None, None]:
    flags = ("--dtype", "float32", "--kv-cache-memory-bytes", "64MiB", "--split", "always", "--queue-timeout", "120")
    with running(tmp_path_factory.mktemp("small"), *flags, model=smollm2_folder) as cluster:
        yield cluster


@pytest.fixture
async def pair(running_pair: Cluster) -> AsyncGenerator[Cluster, None]:
    """One prefill and one decode worker over shared memory, always split, float32, without the `otel` extra."""
    yield running_pair
    await running_pair.nothing_held()


@pytest.fixture
async def four(running_four: Cluster) -> AsyncGenerator[Cluster, None]:
    """Two of each over tcp with checksums, always split, float32, leases of 3 s."""
    yield running_four
    await running_four.everybody_ready()
    await running_four.nothing_held()


@pytest.fixture
async def small(running_small: Cluster) -> AsyncGenerator[Cluster, None]:
    """One of each, always split, float32, with a pool of some 1,450 tokens. A test may take its NATS and Redis away, and
    brings them back."""
    yield running_small
    await running_small.everybody_ready()
    await running_small.nothing_held()


@pytest.fixture
async def client(pair: Cluster) -> AsyncGenerator[AsyncOpenAI, None]:
    """The official client, pointed at `pair`."""
    async with AsyncOpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made
