"""The manners of HTTP, over real sockets: what clients do to a server, and what it does then."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from splitserve.config import HttpSettings
from splitserve.protocol.states import FinishReason
from splitserve.router.generation import Done, Finished, GenerationEvent, Tokens
from splitserve.router.observe import HttpAnswer, NullObserver
from splitserve.router.observers import Observers
from support.generation import MODEL, ScriptedGeneration, ScriptedGenerator, facts, says, served, silent

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
BODY = json.dumps({"messages": MESSAGES}).encode()
STREAM = json.dumps({"messages": MESSAGES, "stream": True}).encode()
CHAT = "/v1/chat/completions"


def post(body: bytes, *headers: str, path: str = CHAT, length: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def client(port: int, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, **options)


class Wire:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int) -> Wire:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer on this connection."""
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            status = int(head[0].split()[1])
            assert head[0].startswith("HTTP/1.1")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
            if status == 100:
                return status, headers, b""
            if "chunked" in headers.get("transfer-encoding", ""):
                return status, headers, await self._chunks()
            return status, headers, await self.reader.readexactly(int(headers.get("content-length", 0)))

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return body


async def slow(generation: ScriptedGeneration) -> AsyncIterator[GenerationEvent]:
    """One token, then nothing for ever."""
    yield Tokens(0, 0, (104,))
    await asyncio.Event().wait()


def endless(generation: ScriptedGeneration) -> AsyncIterator[GenerationEvent]:
    """Tokens without end; as many as the client takes."""

    async def play() -> AsyncIterator[GenerationEvent]:
        at = 0
        while True:
            yield Tokens(0, at, tuple(b"x" * 4096))
            at += 4096
            await asyncio.sleep(0)

    return play()


async def left(generator: ScriptedGenerator) -> None:
    async with asyncio.timeout(10):
        await generator.submitted[0].left.wait()


@pytest.mark.parametrize("offer", ["h2c", "h2c, websocket", "websocket"])
async def test_an_offer_to_upgrade_is_ignored_and_the_body_kept(offer: str):
    headers = (f"Upgrade: {offer}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    async with served(ScriptedGenerator(says("ok"))) as port, await Wire.open(port) as wire:
        wire.writer.write(post(BODY, *headers))
        status, _, body = await wire.answer()
        assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "ok")
        wire.writer.write(post(STREAM, *headers))
        status, answer, body = await wire.answer()
        assert (status, answer["transfer-encoding"]) == (200, "chunked")
        assert body.endswith(b"data: [DONE]\n\n")


async def test_an_old_client_gets_a_stream_without_chunks_until_the_connection_ends():
    async with served(ScriptedGenerator(says("ok"))) as port, await Wire.open(port) as wire:
        wire.writer.write(post(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        async with asyncio.timeout(20):
            head, _, body = (await wire.reader.read()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    lines = [line for line in body.split(b"\n\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"


async def test_what_a_stream_sends_is_counted_to_the_byte():
    told: list[HttpAnswer] = []

    class Watch(NullObserver):
        def answered(self, answer: HttpAnswer) -> None:
            told.append(answer)

    async with (
        served(ScriptedGenerator(says("hello")), observer=Observers(Watch())) as port,
        await Wire.open(port) as wire,
    ):
        wire.writer.write(post(STREAM))
        _, _, body = await wire.answer()
    assert [answer.sent for answer in told] == [len(body)]


async def test_a_client_that_expects_100_continue_gets_it_before_it_sends():
    async with served(ScriptedGenerator(says("ok"))) as port, await Wire.open(port) as wire:
        head, _, _ = post(BODY, "Expect: 100-continue").partition(b"\r\n\r\n")
        wire.writer.write(head + b"\r\n\r\n")
        assert (await wire.answer())[0] == 100
        wire.writer.write(BODY)
        assert (await wire.answer())[0] == 200


async def test_too_large_an_announced_body_is_refused_before_it_is_sent():
    async with served(ScriptedGenerator(says("ok"))) as port, await Wire.open(port) as wire:
        wire.writer.write(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {9 << 20}\r\n\r\n".encode()
        )
        assert (await wire.answer())[0] == 413


async def test_a_chunked_body_is_read_whole():
    async with served(ScriptedGenerator(says("ok"))) as port, await Wire.open(port) as wire:
        wire.writer.write(post(b"", "Transfer-Encoding: chunked", length=False))
        for n in range(0, len(BODY), 7):
            part = BODY[n : n + 7]
            wire.writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            await wire.writer.drain()
        wire.writer.write(b"0\r\n\r\n")
        assert (await wire.answer())[0] == 200


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_proxys_prefix_may_be_left_on_the_path_or_taken_off(prefix: str):
    http = HttpSettings(root_path="/llm/", api_key="secret")
    async with served(ScriptedGenerator(says("Hi")), http=http) as port, client(port) as user:
        assert (await user.get(f"{prefix}/v1/models")).status_code == 401
        assert (await user.post(f"{prefix}{CHAT}", content=BODY)).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert (await user.post(f"{prefix}{CHAT}", content=BODY, headers=key)).status_code == 200
        assert (await user.get(f"{prefix}/v1/models", headers=key)).status_code == 200


async def test_a_web_page_of_an_allowed_origin_may_call_and_another_may_not():
    http = HttpSettings(allowed_origins="https://chat.example, https://b.example", api_key="secret")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    async with served(ScriptedGenerator(says("Hi")), http=http) as port, client(port) as user:
        preflight = await user.options(CHAT, headers={"Origin": "https://chat.example", **asks})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        refused = await user.post(CHAT, content=BODY, headers={"Origin": "https://chat.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"
        stranger = await user.options(CHAT, headers={"Origin": "https://evil.example", **asks})
        assert stranger.status_code == 400
        assert "access-control-allow-origin" not in stranger.headers


async def test_head_is_answered_wherever_get_is():
    async with (
        served(ScriptedGenerator(says("ok")), metrics_pages={"/metrics": page}) as port,
        await Wire.open(port) as wire,
    ):
        for path in (
            "/health",
            "/ready",
            "/version",
            "/metrics",
            "/v1/models",
            f"/v1/models/{MODEL}",
            "/openapi.json",
        ):
            wire.writer.write(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            async with asyncio.timeout(10):
                head = await wire.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), path
        wire.writer.write(f"HEAD {CHAT} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await wire.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 405")


async def test_a_connection_is_kept_between_requests():
    async with served(ScriptedGenerator(says("ok"))) as port, await Wire.open(port) as wire:
        for body in (BODY, STREAM, b"{", BODY):
            wire.writer.write(post(body))
            status, headers, _ = await wire.answer()
            assert status == (400 if body == b"{" else 200)
            assert "close" not in headers.get("connection", "")


async def test_bad_http_is_refused_in_the_same_format():
    async with served(ScriptedGenerator(says("ok"))) as port, await Wire.open(port) as wire:
        wire.writer.write(b"\x16\x03\x01\x02\x00 this is TLS\r\n\r\n")
        status, _, body = await wire.answer()
        assert status == 400
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


async def test_the_request_id_of_the_client_comes_back_and_is_no_key():
    generator = ScriptedGenerator(says("ok"))
    async with served(generator) as port, client(port) as api:
        headers = {"x-request-id": "same", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        answers = await asyncio.gather(*(api.post(CHAT, content=BODY, headers=headers) for _ in range(8)))
        assert {answer.headers["x-request-id"] for answer in answers} == {"same"}
        assert len({answer.json()["id"] for answer in answers}) == 8
        submission = generator.submitted[0].submission
        assert (submission.client_request_id, submission.trace.headers()) == (
            "same",
            {"traceparent": headers["traceparent"]},
        )
        for streamed in (BODY, STREAM):
            answer = await api.post(CHAT, content=streamed)
            assert answer.headers["x-request-id"] == generator.submitted[-1].submission.rid
        for bad in ("x" * 300, "a\x01b"):
            answer = await api.post(CHAT, content=BODY, headers={b"x-request-id": bad.encode()})
            if answer.status_code == 200:  # h11 itself refuses control characters
                assert answer.headers["x-request-id"] == generator.submitted[-1].submission.rid


@pytest.mark.parametrize("body", [BODY, STREAM])
@pytest.mark.parametrize("play", [silent, slow])
async def test_a_client_that_leaves_ends_the_work_at_once(body: bytes, play: Any):
    generator = ScriptedGenerator(play)
    async with served(generator) as port:
        async with await Wire.open(port) as wire:
            wire.writer.write(post(body))
            await generator.arrival.wait()
            if play is slow and body is STREAM:
                await wire.reader.readuntil(b'"h"')
            began = time.monotonic()
        await left(generator)
        assert time.monotonic() - began < 1


async def test_a_client_that_leaves_while_it_sends_costs_nothing():
    generator = ScriptedGenerator(says("ok"))
    async with served(generator) as port:
        async with await Wire.open(port) as wire:
            wire.writer.write(post(BODY)[:-5])
            await wire.writer.drain()
        async with await Wire.open(port) as wire:
            wire.writer.write(post(BODY))
            assert (await wire.answer())[0] == 200
    assert len(generator.submitted) == 1


async def test_a_slow_reader_blocks_nobody_and_is_dropped_when_it_stalls(caplog: pytest.LogCaptureFixture):
    generator = ScriptedGenerator(endless)
    async with served(generator, stall_s=0.5) as port:
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", port))
        stalled.sendall(post(STREAM))  # and reads nothing
        await generator.arrival.wait()
        async with client(port) as api:
            began = time.monotonic()
            assert (await api.get("/health")).status_code == 200
            assert time.monotonic() - began < 1
        await left(generator)
        stalled.close()
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


async def test_a_reader_that_is_slow_gets_every_token():
    generator = ScriptedGenerator(says("y" * 200_000, eos=False, piece=1000, reason=FinishReason.LENGTH))
    async with served(generator, facts=facts(max_model_len=300_000)) as port, await Wire.open(port) as wire:
        body = json.dumps({"messages": MESSAGES, "stream": True, "max_tokens": 200_000}).encode()
        wire.writer.write(post(body))
        got = b""
        async with asyncio.timeout(30):
            while not got.endswith(b"0\r\n\r\n"):
                got += await wire.reader.read(1500)
                await asyncio.sleep(0)
    assert got.count(b"y") - got.count(b"small") == pytest.approx(200_000, abs=2000)


async def test_a_hundred_connections_at_once_are_all_served():
    async with served(ScriptedGenerator(says("hello"))) as port:
        limits = httpx.Limits(max_connections=150)
        async with client(port, limits=limits) as api:
            answers = await asyncio.gather(*(api.post(CHAT, content=(BODY, STREAM)[n % 2]) for n in range(120)))
    assert [answer.status_code for answer in answers] == [200] * 120


async def test_a_prompt_of_a_million_characters_is_refused_in_milliseconds_while_health_answers():
    async with served(ScriptedGenerator(says("ok"))) as port, client(port) as api:
        began = time.monotonic()
        request = asyncio.create_task(api.post("/v1/completions", json={"prompt": "word " * 200_000}))
        assert (await api.get("/health")).status_code == 200
        answer = await request
        assert time.monotonic() - began < 0.5
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert "this model's maximum context length is 512 tokens" in message


async def test_line_ends_of_other_worlds_are_escaped_in_events():
    text = "a\u2028b\u2029c\u0085d"
    async with served(ScriptedGenerator(says(text, piece=64))) as port, await Wire.open(port) as wire:
        wire.writer.write(post(STREAM))
        _, headers, body = await wire.answer()
    assert headers["content-type"].startswith("text/event-stream")
    lines = body.decode().splitlines()
    assert all(line == "" or line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text


async def test_what_is_queued_goes_out_as_one_chunk():
    async def burst(generation: ScriptedGeneration) -> AsyncIterator[GenerationEvent]:
        for at, char in enumerate(b"abcdef"):
            yield Tokens(0, at, (char,))
        yield Finished(0, FinishReason.LENGTH)
        yield Done()

    async with served(ScriptedGenerator(burst)) as port, await Wire.open(port) as wire:
        wire.writer.write(post(STREAM))
        _, _, body = await wire.answer()
    assert body.count(b"data: ") == 3  # role; all text with the reason; [DONE]
    assert b'"content":"abcdef"},"logprobs":null,"finish_reason":"length"' in body


async def test_the_official_client_streams_over_a_real_connection():
    generator = ScriptedGenerator(says("Grüße 👋"))
    async with (
        served(generator) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0) as api,
    ):
        chunks: Any = await api.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        assert "".join([chunk.choices[0].delta.content async for chunk in chunks]) == "Grüße 👋"
        assert [model.id async for model in api.models.list()] == [MODEL, "alias"]
        assert (await api.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await api.models.retrieve("no/such")


async def page(accept: str) -> tuple[bytes, str]:
    return b"x 1\n" * 1000, f"text/plain; asked={accept}"


async def test_metrics_are_compressed_for_those_who_ask():
    async with (
        served(ScriptedGenerator(says("ok")), metrics_pages={"/metrics": page}) as port,
        await Wire.open(port) as wire,
    ):
        wire.writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: a/b\r\nAccept-Encoding: gzip\r\n\r\n")
        _, headers, body = await wire.answer()
        assert (headers["content-encoding"], len(body) < 200) == ("gzip", True)
        assert headers["content-type"] == "text/plain; asked=a/b"
        wire.writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await wire.answer())[2] == b"x 1\n" * 1000


def test_the_routers_http_side_loads_neither_torch_nor_transformers():
    code = (
        "import sys, splitserve.router.app, splitserve.router.protocol;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{root / 'shared'}:{root / 'services'}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("target", "status"), [(b"/health", 200), (b"/nowhere", 404), (b"", 404), (b"/health%23", 404)]
)
async def test_a_target_that_names_scheme_and_host_is_its_path(target: bytes, status: int):
    async with served(ScriptedGenerator(says("ok"))) as port, await Wire.open(port) as wire:
        wire.writer.write(b"GET http://localhost:%d%b?a=b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (port, target))
        assert (await wire.answer())[0] == status
        wire.writer.write(b"GET http://[x/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await wire.answer())[0] == 200


async def test_a_request_that_was_stored_tells_when_it_was_made():
    generator = ScriptedGenerator(says("ok"))
    before = time.time()
    async with served(generator) as port, client(port) as api:
        await api.post("/v1/completions", json={"prompt": ["a", "b"]})
    assert all(before <= generation.submission.created <= time.time() for generation in generator.submitted)
