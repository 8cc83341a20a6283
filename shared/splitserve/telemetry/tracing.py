"""Spans: the small interface that shells write to, and what stands behind it when nobody records.

Spans are made where a request changes hands, never for a token. Times are seconds of this process's monotonic clock;
no duration is ever the difference of two processes' clocks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from typing import Protocol
from urllib.parse import urlsplit

from splitserve.config import TracingSettings
from splitserve.errors import ConfigError
from splitserve.protocol.trace import NO_TRACE, TraceContext, new_trace

log = logging.getLogger("splitserve.telemetry")

Attributes = Mapping[str, str | bool | int | float | Sequence[str]]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
_INSTALL = "pip install 'splitserve[otel]'"
_TRACES_PATH = "/v1/traces"


class SpanKind(StrEnum):
    SERVER = "server"  # a request of somebody outside: it begins a trace when its parent is none
    CONSUMER = "consumer"  # work that came over the bus
    INTERNAL = "internal"


class Span(Protocol):
    """A stretch of work under way. Once ended, it takes nothing more."""

    @property
    def trace(self) -> TraceContext:
        """What to carry on, so that what follows has this span as its parent."""
        ...

    @property
    def recording(self) -> bool: ...

    def set(self, attributes: Attributes) -> None: ...

    def event(self, name: str, at: float, attributes: Attributes = {}) -> None:  # noqa: B006  # nobody writes to it
        """Something that happened at one moment."""
        ...

    def end(self, at: float, error: str = "") -> None:
        """`error` is a wire code or reason, "" when all went well."""
        ...


class Tracer(Protocol):
    """Makes spans."""

    @property
    def recording(self) -> bool:
        """False: spans lead nowhere, and need not be made."""
        ...

    def start(
        self, name: str, parent: TraceContext, at: float, attributes: Attributes, kind: SpanKind = SpanKind.INTERNAL
    ) -> Span:
        """A span that began at `at`. Under no parent, or one that is not sampled, it records nothing."""
        ...

    async def close(self) -> None:
        """Send what is left, in bounded time."""
        ...


class NullSpan:
    """Passes its context on."""

    recording = False

    def __init__(self, trace: TraceContext) -> None:
        self.trace = trace

    def set(self, attributes: Attributes) -> None: ...

    def event(self, name: str, at: float, attributes: Attributes = {}) -> None: ...  # noqa: B006

    def end(self, at: float, error: str = "") -> None: ...


class NullTracer:
    """Records nothing; a request without a trace still gets an id that its messages carry."""

    recording = False

    def start(
        self, name: str, parent: TraceContext, at: float, attributes: Attributes, kind: SpanKind = SpanKind.INTERNAL
    ) -> Span:
        new = kind is SpanKind.SERVER and parent == NO_TRACE
        return NullSpan(new_trace() if new else parent)

    async def close(self) -> None: ...


def traces_url(endpoint: str) -> str:
    """The URL to post to: `/v1/traces` is added where the endpoint names only a host. Raises ConfigError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"--otlp-traces-endpoint {endpoint!r}: give the URL of an OTLP/HTTP receiver, such as http://localhost:4318/v1/traces"
        )
    return endpoint if parts.path.strip("/") else parts._replace(path=_TRACES_PATH).geturl()


def missing_extra() -> str:
    """The first module of the `otel` extra that is not installed, "" when all are there."""
    for name in _NEEDED:
        try:
            found = find_spec(name)
        except ModuleNotFoundError:  # a parent package of it
            found = None
        if found is None:
            return name
    return ""


def check_tracing(settings: TracingSettings) -> None:
    """Raises ConfigError when an endpoint is asked for and cannot be served: malformed, or the extra is missing."""
    if not settings.otlp_traces_endpoint:
        return
    traces_url(settings.otlp_traces_endpoint)
    missing = missing_extra()
    if missing:
        raise ConfigError(f"--otlp-traces-endpoint needs OpenTelemetry, and {missing} is not installed: {_INSTALL}")


def open_tracer(settings: TracingSettings, service: str, instance: str, cluster: str) -> Tracer:
    """The tracer of a process: on when the flag, or OpenTelemetry's own environment, names an endpoint.

    Raises ConfigError like `check_tracing`. An endpoint in the environment alone is no reason not to start: without the
    extra it is a warning.
    """
    check_tracing(settings)
    by_flag = bool(settings.otlp_traces_endpoint)
    by_environment = any(os.environ.get(name) for name in _ENDPOINTS)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if (
        disabled
        or not (by_flag or by_environment)
        or (not by_flag and os.environ.get("OTEL_TRACES_EXPORTER") == "none")
    ):
        return NullTracer()
    missing = missing_extra()
    if missing:
        log.warning("no tracing: the extra is not installed", extra={"missing": missing, "do": _INSTALL})
        return NullTracer()
    from splitserve.telemetry.otlp import OtlpTracer  # late: the base install has no OpenTelemetry SDK

    url = traces_url(settings.otlp_traces_endpoint) if by_flag else None
    log.info("tracing", extra={"endpoint": url or "of the environment"})
    return OtlpTracer.over_http(url, service=service, instance=instance, cluster=cluster)
