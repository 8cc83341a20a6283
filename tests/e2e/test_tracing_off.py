"""Without the `otel` extra: everything starts, traces are passed on, and only who asks for spans is refused."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest

from splitserve.bus.bus import Bus
from splitserve.protocol.messages import Message
from support.cluster import Cluster
from support.processes import environment
from support.waiting import until

pytestmark = [pytest.mark.e2e]

TRACEPARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


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
async def test_a_trace_goes_from_the_http_request_through_every_message_of_it(pair: Cluster) -> None:
    heard: list[Message] = []
    bus = await Bus.connect(pair.nats.url, name="test", role="router", connect_timeout_s=5)
    try:
        await bus.subscribe("ss1.>", lambda message, _reply_to: heard.append(message))
        await bus.flush(5)
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"model": pair.model, "prompt": "Once upon a time", "max_tokens": 4}
            headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
            (await client.post(f"{pair.url}/v1/completions", json=body, headers=headers)).raise_for_status()

        def of(kind: str) -> list[Message]:
            return [message for message in list(heard) if type(message).__name__ == kind]

        for kind in ("DecodeJob", "PrefillJob", "KvReady", "KvLoaded", "Release"):
            await until(lambda kind=kind: bool(of(kind)), f"a {kind}", 20)
            traces = {str(getattr(message, "trace").headers()) for message in of(kind)}  # noqa: B009
            assert traces == {str(headers)}, kind
    finally:
        await bus.close()
