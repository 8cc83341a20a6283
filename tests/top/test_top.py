"""`splitserve top` against a real HTTP router: once, live, refused, and with nobody there."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from splitserve.config import HttpSettings
from splitserve.errors import ConfigError, NeverReady
from splitserve.protocol.status import Snapshot
from splitserve.top.client import fetch, status_url
from splitserve.top.view import WIDE, view
from splitserve.top.words import age, duration, share
from support.generation import ScriptedGenerator, says, served
from support.status import cluster, empty, status_page, worker


def text(snapshot: Snapshot, width: int = WIDE, rows: int = 12) -> str:
    console = Console(width=width, file=StringIO())
    with console.capture() as capture:
        console.print(view(snapshot, rows=rows, width=width))
    return capture.get()


async def top(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "splitserve", "top", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def test_every_worker_and_request_is_named_with_its_state():
    dead = worker("decode-9", "decode", state="lost", silent_s=75.0, queued_tokens=977)
    shown = text(replace(cluster(), workers=(*cluster().workers, dead)))
    for word in ("router-0", "prefill-1", "decode-1", "412.0 tokens/s", "TTFT 184 ms", "21.3 ms", "lost, silent 75 s"):
        assert word in shown
    assert "failed loss_budget_spent" in shown
    assert "977" not in shown, "what a worker said last means nothing once it is gone"
    assert "…" not in shown


@pytest.mark.parametrize("width", [60, 80, 120])
def test_in_a_narrow_terminal_no_line_is_longer_than_it(width: int):
    assert max(map(len, text(cluster(), width).splitlines())) <= width


def test_nobody_there_is_said():
    shown = text(empty())
    assert "no prefill worker" in shown
    assert "no decode worker" in shown
    assert "not ready: no decode worker lives" in shown
    assert "no request yet" in shown


def test_only_so_many_requests_are_shown():
    assert text(cluster(), rows=2).count("chatcmpl-") == 2
    assert "request (of 5)" in text(cluster(), rows=2)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "–"), (0.00084, "840 µs"), (0.0123, "12.3 ms"), (1.449, "1.45 s"), (99.96, "100 s"), (3000.0, "50 min")],
)
def test_a_duration_has_three_digits(seconds: float | None, words: str):
    assert duration(seconds) == words


def test_an_age_has_one_unit_and_a_share_all_its_cells():
    assert [age(s) for s in (5.9, 119.0, 120.0, 7200.0, 200_000.0)] == ["5 s", "119 s", "2 min", "2 h", "2 d"]
    assert share(0.5, 4) == ("██", "░░")
    assert share(1.7, 4) == ("████", "")


@pytest.mark.parametrize("given", ["host:8000", "http://host:8000", "http://host:8000/"])
def test_a_router_is_named_with_or_without_its_scheme(given: str):
    assert status_url(given) == "http://host:8000/status.json"
    assert status_url("https://host/llm/") == "https://host/llm/status.json"


@pytest.mark.parametrize("given", ["file:///etc/passwd", "http://", "ftp://host"])
def test_what_is_no_router_is_refused(given: str):
    with pytest.raises(ConfigError, match="no URL of a router"):
        status_url(given)


async def test_once_prints_the_status_plainly_and_leaves():
    async with status_page(cluster) as port:
        code, out, err = await top(f"127.0.0.1:{port}", "--once")
    assert (code, err) == (0, "")
    assert "decode-1" in out
    assert "\x1b" not in out


async def test_nobody_there_is_one_line_and_an_exit_code():
    code, out, err = await top("127.0.0.1:9", "--once")
    assert (code, out) == (8, "")
    assert len(err.splitlines()) == 1
    assert "no router answers at http://127.0.0.1:9" in err


async def test_the_key_is_asked_for_and_taken():
    async with status_page(cluster, http=HttpSettings(api_key="k")) as port:
        url = f"http://127.0.0.1:{port}/status.json"
        with pytest.raises(ConfigError, match="asks for a key"):
            await asyncio.to_thread(fetch, url, "")
        with pytest.raises(ConfigError, match="does not take that key"):
            await asyncio.to_thread(fetch, url, "other")
        assert await asyncio.to_thread(fetch, url, "k") == cluster()


async def test_a_router_without_the_page_or_no_router_at_all_is_told():
    async with served(ScriptedGenerator(says("ok"))) as port:
        with pytest.raises(ConfigError, match="no-status-page"):
            await asyncio.to_thread(fetch, f"http://127.0.0.1:{port}/status.json", "")
        with pytest.raises(ConfigError, match="not with the status"):
            await asyncio.to_thread(fetch, f"http://127.0.0.1:{port}/health", "")


async def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("splitserve.top.client.TIMEOUT_S", 0.2)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(NeverReady, match="timed out"):
            await asyncio.to_thread(fetch, f"http://127.0.0.1:{port}/status.json", "")
