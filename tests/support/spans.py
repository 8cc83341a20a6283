"""Spans in tests: kept in memory, sent to a collector on a real socket, or made of what a worker's core does."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from splitserve.decode.jobs import DecodeJobs
from splitserve.prefill.jobs import PrefillJobs
from splitserve.protocol.trace import TraceContext
from splitserve.runtime.shell import Watch
from splitserve.telemetry.otlp import OtlpTracer
from support.worker_cores import Driver

CALLER = TraceContext(f"00-{'ab' * 16}-{'cd' * 8}-01", "vendor=1")
UNSAMPLED = TraceContext(f"00-{'ab' * 16}-{'cd' * 8}-00")


@dataclass(frozen=True)
class Seen:
    """A finished span. Times are nanoseconds of the wall clock of the process that made it."""

    name: str
    trace_id: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    failed: bool
    service: str
    instance: str

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


class Memory:
    """A tracer whose spans stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        processor = SimpleSpanProcessor(self._exporter)
        self.tracer = OtlpTracer(processor, service="test", instance="test-0", cluster="c")

    @property
    def spans(self) -> dict[str, Seen]:
        """By name; the last of each."""
        return {span.name: _of_sdk(span) for span in self._exporter.get_finished_spans()}


def _of_sdk(span: ReadableSpan) -> Seen:
    own = span.get_span_context()
    assert own is not None
    assert span.start_time is not None
    assert span.end_time is not None
    return Seen(
        span.name,
        f"{own.trace_id:032x}",
        f"{own.span_id:016x}",
        f"{span.parent.span_id:016x}" if span.parent else "",
        span.start_time,
        span.end_time,
        dict(span.attributes or {}),
        {event.name: dict(event.attributes or {}) for event in span.events},
        not span.status.is_ok and not span.status.is_unset,
        str(span.resource.attributes["service.name"]),
        str(span.resource.attributes["service.instance.id"]),
    )


class WatchedDriver(Driver):
    """A core with somebody who looks on, as its shell has it."""

    def __init__(self, core: PrefillJobs | DecodeJobs, watch: Watch) -> None:
        super().__init__(core)
        self._watch = watch

    def event(self, event: object) -> list[Any]:
        commands = super().event(event)
        self._watch(event, commands, self.now)
        return commands


class Collector:
    """What an OTLP/HTTP receiver got."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Seen] = []
        self.bodies: list[bytes] = []

    def of(self, trace_id: str) -> list[Seen]:
        return [span for span in list(self.spans) if span.trace_id == trace_id]

    def take(self, path: str, body: bytes) -> int:
        """The HTTP status for a POST."""
        if path != "/v1/traces":
            return 404
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Seen(
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            _values(span.attributes),
                            {event.name: _values(event.attributes) for event in span.events},
                            span.status.code == span.status.STATUS_CODE_ERROR,
                            about["service.name"],
                            about["service.instance.id"],
                        )
                    )
        return 200


def _values(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind) if kind else None


@contextmanager
def collecting() -> Generator[Collector]:
    """A collector on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status = collector.take(self.path, self.rfile.read(int(self.headers["content-length"])))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="collector")
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
