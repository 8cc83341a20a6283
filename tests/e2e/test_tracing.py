"""One request is one trace, over four processes and a death among them, as a collector receives it."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from support.cluster import Cluster, running
from support.spans import Collector, Seen, collecting
from support.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.slow]

PROMPT = "The heron counts its fishes"
EVERY_SPAN = {
    "text_completion",
    "tokenise",
    "generate",
    "place",
    "reserve",
    "prefill",
    "queue",
    "compute",
    "kv_transfer",
    "decode",
    "first_step",
}
CALLER_SPAN = "cd" * 8


@pytest.fixture(scope="module")
def collector() -> Generator[Collector, None, None]:
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def cluster(
    smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Generator[Cluster, None, None]:
    flags = ("--decode", "2", "--split", "always", "--kv-cache-memory-bytes", "128MiB", "--dtype", "float32")
    folder = tmp_path_factory.mktemp("traced")
    endpoint = ("--otlp-traces-endpoint", collector.url)
    with running(folder, *flags, *endpoint, model=smollm2_folder, OTEL_BSP_SCHEDULE_DELAY="100") as made:
        yield made


async def complete(cluster: Cluster, trace_id: str, *, flags: str = "01", tokens: int = 8) -> str:
    """The answer's text."""
    headers = {"traceparent": f"00-{trace_id}-{CALLER_SPAN}-{flags}"} if trace_id else {}
    async with AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        body = {"ignore_eos": True}
        answer = await client.completions.create(
            model=cluster.model, prompt=PROMPT, max_tokens=tokens, extra_headers=headers, extra_body=body
        )
    return answer.choices[0].text


async def whole(collector: Collector, trace_id: str) -> dict[str, Seen]:
    """The spans of a trace by name, once all processes have sent theirs; `queue` by its parent's, which a killed worker never sent."""

    def there() -> bool:
        return {span.name.partition(" ")[0] for span in collector.of(trace_id)} >= EVERY_SPAN

    await until(there, f"the spans {sorted(EVERY_SPAN)}", 20)
    spans = collector.of(trace_id)
    names = {span.id: span.name for span in spans}
    return {f"{names.get(s.parent, 'lost')}/queue" if s.name == "queue" else s.name.partition(" ")[0]: s for s in spans}


async def test_a_request_is_one_trace_over_router_prefill_transfer_and_decode(
    cluster: Cluster, collector: Collector
) -> None:
    trace_id = secrets.token_hex(16)
    text = await complete(cluster, trace_id)
    spans = await whole(collector, trace_id)
    parents = {name: next((n for n, s in spans.items() if s.id == span.parent), "") for name, span in spans.items()}
    assert parents == {
        "text_completion": "",
        "tokenise": "text_completion",
        "generate": "text_completion",
        "place": "generate",
        "reserve": "generate",
        "prefill": "generate",
        "prefill/queue": "prefill",
        "compute": "prefill",
        "kv_transfer": "generate",
        "decode": "generate",
        "decode/queue": "decode",
        "first_step": "decode",
    }
    assert spans["text_completion"].parent == CALLER_SPAN
    services = {span.name.partition(" ")[0]: span.service for span in spans.values() if span.name != "queue"}
    assert services["text_completion"] == services["generate"] == services["reserve"] == "splitserve-router"
    assert services["prefill"] == services["compute"] == "splitserve-prefill"
    assert services["kv_transfer"] == services["decode"] == "splitserve-decode"
    assert not any(span.failed for span in spans.values())
    root = spans["text_completion"]
    assert root.attributes["gen_ai.usage.output_tokens"] == 8
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert spans["kv_transfer"].attributes["splitserve.kv.bytes"] > 0
    assert spans["decode"].attributes["splitserve.decoded_tokens"] == 7  # the first came from prefill
    inside = sum(spans[name].seconds for name in ("tokenise", "place", "reserve", "prefill", "kv_transfer", "decode"))
    assert 0.5 * root.seconds < inside < 1.2 * root.seconds
    sent = b"".join(collector.bodies)
    assert PROMPT.split()[1].encode() not in sent
    assert text.strip().encode() not in sent


async def test_a_killed_decode_worker_shows_as_a_resume_in_the_same_trace(
    cluster: Cluster, collector: Collector
) -> None:
    trace_id = secrets.token_hex(16)
    running_request = asyncio.create_task(complete(cluster, trace_id, tokens=96))
    await until(lambda: any(s.name == "kv_transfer" for s in collector.of(trace_id)), "the first transfer", 60)
    first = next(span for span in collector.of(trace_id) if span.name == "kv_transfer")
    victim = first.attributes["splitserve.worker"]
    cluster.send("-".join(("decode", victim.rpartition("-")[2])), signal.SIGKILL)
    await running_request
    spans = await whole(collector, trace_id)
    generate, decode = spans["generate"], spans["decode"]
    resume = generate.events["splitserve.resume"]
    assert generate.events["splitserve.decode_lost"]["splitserve.decode.worker"] == victim
    assert resume["splitserve.decode.worker.before"] == victim
    assert resume["splitserve.decode.worker"] == decode.instance != victim
    assert resume["splitserve.output_tokens"] > 0
    assert decode.attributes["splitserve.decode.attempt"] == resume["splitserve.decode.attempt"] > 1
    assert decode.parent == generate.id

    def prefills() -> list[Seen]:
        return [span for span in collector.of(trace_id) if span.name == "prefill"]

    await until(lambda: len(prefills()) >= 2, "both prefills", 20)
    assert sorted(span.attributes["splitserve.prefill.attempt"] for span in prefills()) == [1, 2]
    assert generate.attributes["splitserve.workers_lost"] == 1
    assert not spans["text_completion"].failed
    await cluster.everybody_ready()


async def test_a_caller_that_does_not_sample_and_the_readiness_probe_leave_no_span(
    cluster: Cluster, collector: Collector
) -> None:
    silent, loud = secrets.token_hex(16), secrets.token_hex(16)
    await complete(cluster, silent, flags="00")
    await complete(cluster, loud)
    await whole(collector, loud)
    assert collector.of(silent) == []
    assert not [s for s in collector.spans if str(s.attributes.get("splitserve.request.id", "")).startswith("probe-")]


async def test_a_request_without_a_trace_begins_one(cluster: Cluster, collector: Collector) -> None:
    before = {span.trace_id for span in collector.spans}
    async with httpx.AsyncClient(timeout=120) as client:
        body = {"model": cluster.model, "prompt": PROMPT, "max_tokens": 2}
        answer = (await client.post(f"{cluster.url}/v1/completions", json=body)).raise_for_status()

    def root() -> list[Seen]:
        return [s for s in list(collector.spans) if s.trace_id not in before and s.name.startswith("text_completion ")]

    await until(lambda: bool(root()), "a root span of a new trace", 20)
    (span,) = root()
    assert span.parent == ""
    assert span.attributes["gen_ai.response.id"] == answer.json()["id"]
