from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from splitserve.errors import PortTaken
from splitserve.protocol.states import Role
from splitserve.runtime.http import bind, health_app, port_of, serving
from splitserve.telemetry.metrics import Metrics


def a_page(accept: str) -> tuple[bytes, str]:
    return Metrics(Role.DECODE, model_name="m", engine="decode-0", max_model_len=2048).answer(accept)


async def test_health_ready_and_metrics_answer() -> None:
    sock = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port_of(sock)}"
    why_not = ["the engine loads"]
    async with (
        serving(health_app(a_page, lambda: why_not[0]), sock),
        httpx.AsyncClient(base_url=url) as client,
    ):
        assert (await client.get("/health")).status_code == 200
        waiting = await client.get("/ready")
        assert (waiting.status_code, waiting.text) == (503, "the engine loads\n")
        why_not[0] = ""
        assert (await client.get("/ready")).status_code == 200
        page = await client.get("/metrics")
        assert "text/plain" in page.headers["content-type"]
        assert 'vllm:num_requests_running{engine="decode-0",model_name="m"} 0.0' in page.text
        asked = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert asked.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert asked.text.endswith("# EOF\n")


def test_a_taken_port_is_one_clear_error() -> None:
    with bind("127.0.0.1", 0) as sock, pytest.raises(PortTaken, match=f"127.0.0.1:{port_of(sock)}"):
        bind("127.0.0.1", port_of(sock))


def test_a_host_that_is_not_this_machines_is_one_clear_error() -> None:
    with pytest.raises(PortTaken, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)


async def test_the_server_is_gone_after_its_block() -> None:
    sock = bind("127.0.0.1", 0)
    port = port_of(sock)
    async with serving(Starlette(), sock):
        pass
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncio.open_connection("127.0.0.1", port)


async def test_what_is_written_goes_out_at_once() -> None:
    """Without TCP_NODELAY an answer's body waits for the acknowledgement of its head, which clients delay by 40 ms."""
    seen: list[int] = []

    class Looking(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            super().connection_made(transport)

    sock = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port_of(sock)}"
    async with serving(health_app(a_page, str), sock, protocol=Looking), httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/health")).status_code == 200
    assert seen == [1]
