"""Spans: when they are made, what they are under, how long they are, and what is said when they cannot be."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Generator

import pytest

from splitserve.config import TracingSettings
from splitserve.errors import ConfigError
from splitserve.protocol.trace import NO_TRACE
from splitserve.telemetry import otlp
from splitserve.telemetry.otlp import OtlpTracer
from splitserve.telemetry.tracing import NullTracer, SpanKind, Tracer, open_tracer, traces_url
from support.spans import CALLER, UNSAMPLED, Memory, collecting


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `pip install splitserve`."""
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)


@pytest.fixture
def frozen() -> Generator[str]:
    """The URL of a receiver that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def opened(endpoint: str = "") -> Tracer:
    return open_tracer(TracingSettings(otlp_traces_endpoint=endpoint), "splitserve-router", "router-0", "default")


def test_a_span_lies_in_the_callers_trace_and_names_itself_as_the_parent_of_what_follows() -> None:
    memory = Memory()
    now = time.monotonic()
    root = memory.tracer.start("root", CALLER, now - 2, {"a": 1}, SpanKind.SERVER)
    memory.tracer.start("child", root.trace, now - 1.5, {}).end(now - 1)
    root.event("happened", now - 1, {"n": 2})
    root.end(now)
    spans = memory.spans
    assert {span.trace_id for span in spans.values()} == {CALLER.trace_id}
    assert spans["root"].parent == CALLER.span_id
    assert spans["child"].parent == spans["root"].id == root.trace.span_id
    assert root.trace.tracestate == CALLER.tracestate
    assert spans["root"].events == {"happened": {"n": 2}}
    assert not spans["root"].failed


def test_the_length_of_a_span_is_that_of_the_monotonic_clock_and_its_start_is_now() -> None:
    memory = Memory()
    now = time.monotonic()
    span = memory.tracer.start("s", CALLER, now - 1.25, {})
    span.end(now, "too_late")
    seen = memory.spans["s"]
    assert seen.seconds == pytest.approx(1.25, abs=1e-6)
    assert abs(seen.end / 1e9 - time.time()) < 5
    assert seen.failed
    assert seen.attributes["error.type"] == "too_late"


def test_a_caller_that_does_not_sample_is_obeyed_and_its_trace_passed_on() -> None:
    memory = Memory()
    root = memory.tracer.start("root", UNSAMPLED, time.monotonic(), {}, SpanKind.SERVER)
    child = memory.tracer.start("child", root.trace, time.monotonic(), {})
    for span in (child, root):
        span.end(time.monotonic())
    assert (root.recording, root.trace.trace_id, root.trace.sampled) == (False, UNSAMPLED.trace_id, False)
    assert child.trace == root.trace
    assert memory.spans == {}


def test_without_a_caller_a_request_begins_a_trace_and_other_work_has_none() -> None:
    memory = Memory()
    root = memory.tracer.start("root", NO_TRACE, time.monotonic(), {}, SpanKind.SERVER)
    probe = memory.tracer.start("work", NO_TRACE, time.monotonic(), {}, SpanKind.CONSUMER)
    assert root.recording
    assert root.trace.sampled
    assert (probe.recording, probe.trace) == (False, NO_TRACE)
    root.end(time.monotonic())


@pytest.mark.parametrize("kind", [SpanKind.SERVER, SpanKind.INTERNAL])
def test_with_tracing_off_the_callers_context_is_passed_on_as_it_is(kind: SpanKind) -> None:
    assert NullTracer().start("x", CALLER, 0.0, {}, kind).trace == CALLER


def test_with_tracing_off_a_request_without_a_trace_gets_one_that_is_not_sampled() -> None:
    made = NullTracer().start("x", NO_TRACE, 0.0, {}, SpanKind.SERVER).trace
    assert made.trace_id
    assert not made.sampled
    assert NullTracer().start("x", NO_TRACE, 0.0, {}).trace == NO_TRACE


def test_an_endpoint_without_a_path_is_completed_and_one_with_a_path_is_left() -> None:
    assert traces_url("http://host:4318") == traces_url("http://host:4318/") == "http://host:4318/v1/traces"
    assert traces_url("https://host/otel/v1/traces?x=1") == "https://host/otel/v1/traces?x=1"


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://localhost:4317", "http://"])
def test_an_endpoint_that_is_no_http_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="OTLP/HTTP"):
        opened(endpoint)


def test_tracing_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not opened().recording
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not opened("http://localhost:4318").recording


@pytest.mark.usefixtures("without_extra")
def test_without_the_extra_a_flag_is_refused_and_an_environment_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'splitserve\[otel\]'"):
        opened("http://localhost:4318")
    assert not opened().recording
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert not opened().recording
    assert "no tracing" in caplog.text


async def test_spans_reach_a_receiver_by_flag_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=mine")
        for endpoint in (collector.url, ""):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "" if endpoint else collector.url)
            tracer = opened(endpoint)
            tracer.start(endpoint or "by environment", CALLER, time.monotonic(), {}).end(time.monotonic())
            await tracer.close()
        assert {(s.name, s.service, s.instance) for s in collector.of(CALLER.trace_id)} == {
            (collector.url, "splitserve-router", "mine"),
            ("by environment", "splitserve-router", "mine"),
        }


async def test_a_receiver_that_never_answers_does_not_keep_a_process(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "CLOSE_S", 0.3)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracer = OtlpTracer.over_http(f"{frozen}/v1/traces", service="s", instance="i", cluster="c")
    tracer.start("x", CALLER, time.monotonic(), {}).end(time.monotonic())
    began = time.monotonic()
    await tracer.close()
    assert time.monotonic() - began < 1
