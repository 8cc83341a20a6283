"""What the router's HTTP side is made of; the process that starts it composes them."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from splitserve.config import HttpSettings, RoutingSettings
from splitserve.model.facts import ModelFacts
from splitserve.model.tokenizer import Tokenizer
from splitserve.router.generation import Generator
from splitserve.router.observers import Observers
from splitserve.router.status.feed import StatusFeed
from splitserve.telemetry.tracing import NullTracer, Tracer

FLEET_PAGE = "/metrics"  # the whole fleet as one server would show it
ROUTER_PAGE = "/metrics/router"  # this router's own series, for Prometheus

# (the Accept header) -> (body, its content type); may raise SplitserveError
MetricsPage = Callable[[str], Awaitable[tuple[bytes, str]]]
# id -> the stored record, None when there is none; raises StoreUnavailable
ReadRequest = Callable[[str], Awaitable[Mapping[str, object] | None]]


@dataclass(frozen=True)
class RouterParts:
    """`model_names` are those that clients may use, the first is echoed. `why_not_ready` gives "" when ready."""

    generator: Generator
    tokenizer: Tokenizer
    facts: ModelFacts
    model_names: tuple[str, ...]
    http: HttpSettings
    routing: RoutingSettings
    read_request: ReadRequest
    why_not_ready: Callable[[], str]
    metrics_pages: Mapping[str, MetricsPage] = field(default_factory=dict[str, MetricsPage])  # by path
    observer: Observers = field(default_factory=Observers)
    status: StatusFeed | None = None  # None: no status page
    tracer: Tracer = field(default_factory=NullTracer)
    trust_request_chat_template: bool = False
    draw_seed: Callable[[], int] = field(default=lambda: secrets.randbits(64))
    stall_s: float = 60.0  # a client that reads nothing for so long is dropped
