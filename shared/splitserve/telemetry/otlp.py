"""Spans by the OpenTelemetry SDK, sent as OTLP over HTTP from a thread of its own. Imported only when asked for.

Sampler, batching, headers, time-outs and resource attributes are those of OpenTelemetry's own environment variables.
"""

from __future__ import annotations

import asyncio
import threading
import time

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags, set_span_in_context
from opentelemetry.trace import Span as SdkSpan
from opentelemetry.trace import SpanKind as SdkKind
from opentelemetry.trace.span import TraceState

from splitserve.protocol.trace import NO_TRACE, TraceContext
from splitserve.telemetry.build import installed_version
from splitserve.telemetry.tracing import Attributes, NullSpan, Span, SpanKind

CLOSE_S = 3.0
_KINDS = {
    SpanKind.SERVER: SdkKind.SERVER,
    SpanKind.CONSUMER: SdkKind.CONSUMER,
    SpanKind.INTERNAL: SdkKind.INTERNAL,
}


class OtlpSpan:
    """One span of the SDK. The wall clock is read once, at its start: its length is the monotonic clock's."""

    recording = True

    def __init__(self, span: SdkSpan, at: float, at_ns: int) -> None:
        self.trace = _context_of(span)
        self._span = span
        self._at = at
        self._at_ns = at_ns

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, at: float, attributes: Attributes = {}) -> None:  # noqa: B006  # nobody writes to it
        self._span.add_event(name, attributes, self._ns(at))

    def end(self, at: float, error: str = "") -> None:
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(self._ns(at))

    def _ns(self, at: float) -> int:
        return self._at_ns + round(max(0.0, at - self._at) * 1e9)


class OtlpTracer:
    """Sends what is sampled. A receiver that is away costs log lines, never a request."""

    recording = True

    def __init__(self, processor: SpanProcessor, *, service: str, instance: str, cluster: str) -> None:
        own = Resource.create({
            "service.name": service,
            "service.namespace": f"splitserve.{cluster}",
            "service.instance.id": instance,
            "service.version": installed_version(),
        })  # fmt: skip
        given = OTELResourceDetector().detect()  # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES: they win
        self._provider = TracerProvider(resource=own.merge(given), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("splitserve", installed_version())

    @classmethod
    def over_http(cls, url: str | None, *, service: str, instance: str, cluster: str) -> OtlpTracer:
        """`url` None: as OpenTelemetry's environment says."""
        exporter = OTLPSpanExporter(endpoint=url)
        return cls(BatchSpanProcessor(exporter), service=service, instance=instance, cluster=cluster)

    def start(
        self, name: str, parent: TraceContext, at: float, attributes: Attributes, kind: SpanKind = SpanKind.INTERNAL
    ) -> Span:
        outside = kind is SpanKind.SERVER  # then the sampler decides, else what it decided holds
        if not outside and not parent.sampled:
            return NullSpan(parent)
        at_ns = time.time_ns() - round((time.monotonic() - at) * 1e9)
        span = self._tracer.start_span(name, _under(parent), _KINDS[kind], attributes, start_time=at_ns)
        return OtlpSpan(span, at, at_ns) if span.is_recording() else NullSpan(_context_of(span))

    async def close(self) -> None:
        thread = threading.Thread(target=self._provider.shutdown, name="spans-out", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, CLOSE_S)


def _under(parent: TraceContext) -> Context:
    if parent == NO_TRACE:
        return Context()
    flags = TraceFlags(int(parent.traceparent[53:], 16))
    state = TraceState.from_header([parent.tracestate]) if parent.tracestate else None
    remote = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), True, flags, state)
    return set_span_in_context(NonRecordingSpan(remote), Context())


def _context_of(span: SdkSpan) -> TraceContext:
    own = span.get_span_context()
    parent = f"00-{own.trace_id:032x}-{own.span_id:016x}-{int(own.trace_flags):02x}"
    return TraceContext(parent, own.trace_state.to_header())
