"""Without the `otel` extra: everything starts, traces are passed on, and only who asks for spans is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from splitserve.bus.bus import Bus
from splitserve.protocol.messages import Message
from support.cluster import Cluster, running
from support.processes import environment
from support.waiting import until

pytestmark = [pytest.mark.e2e]

TRACEPARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


@pytest.fixture
def without_extra(tmp_path: Path) -> str:
    """A PYTHONPATH on which OpenTelemetry's SDK is as good as not installed (its API comes with FastAPI)."""
    (tmp_path / "shadow" / "opentelemetry" / "sdk").mkdir(parents=True)
    (tmp_path / "shadow" / "opentelemetry" / "sdk" / "__init__.py").touch()
    return os.pathsep.join((str(tmp_path / "shadow"), environment()["PYTHONPATH"]))


@pytest.fixture
def bare(smollm2_folder: Path, tmp_path: Path, without_extra: str) -> Generator[Cluster]:
    flags = ("--split", "always", "--kv-cache-memory-bytes", "64MiB", "--dtype", "float32")
    with running(tmp_path, *flags, model=smollm2_folder, PYTHONPATH=without_extra) as made:
        yield made


@pytest.mark.parametrize("command", ["serve", "router", "prefill", "decode"])
def test_a_collector_is_refused_with_one_line_that_says_what_to_install(command: str, without_extra: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "splitserve", command, "--otlp-traces-endpoint", "http://127.0.0.1:4318"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(PYTHONPATH=without_extra),
    )
    assert done.returncode != 0
    assert done.stderr == (
        "splitserve: --otlp-traces-endpoint needs OpenTelemetry, and opentelemetry.sdk.trace is not installed: "
        "pip install 'splitserve[otel]'\n"
    )


@pytest.mark.model
@pytest.mark.slow
async def test_a_trace_goes_from_the_http_request_through_every_message_of_it(bare: Cluster) -> None:
    heard: list[Message] = []
    bus = await Bus.connect(bare.nats.url, name="test", role="router", connect_timeout_s=5)
    try:
        await bus.subscribe("ss1.>", lambda message, _reply_to: heard.append(message))
        await bus.flush(5)
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"model": bare.model, "prompt": "Once upon a time", "max_tokens": 4}
            headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
            (await client.post(f"{bare.url}/v1/completions", json=body, headers=headers)).raise_for_status()

        def of(kind: str) -> list[Message]:
            return [message for message in list(heard) if type(message).__name__ == kind]

        for kind in ("DecodeJob", "PrefillJob", "KvReady", "KvLoaded", "Release"):
            await until(lambda kind=kind: bool(of(kind)), f"a {kind}", 20)
            traces = {str(getattr(message, "trace").headers()) for message in of(kind)}  # noqa: B009
            assert traces == {str(headers)}, kind
    finally:
        await bus.close()
