"""HTTP series as prometheus-fastapi-instrumentator names them. Probes and metrics pages are left out."""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Histogram, Summary

from splitserve.router.observe import HttpAnswer
from splitserve.router.parts import FLEET_PAGE, ROUTER_PAGE
from splitserve.telemetry.metrics import Metrics

_NOT_COUNTED = frozenset({"/health", "/ready", "/version", FLEET_PAGE, ROUTER_PAGE})
_LEFT = 4  # a client that leaves before its answer is a 4xx
NO_ROUTE = "none"


class HttpMetrics:
    """Children are made with their first answer: routes and methods are few."""

    def __init__(self, metrics: Metrics) -> None:
        self._fine = metrics.histogram("http_request_duration_highr_seconds")
        self._route = cache(lambda handler: _route(metrics, handler))
        self._coarse = cache(
            lambda handler, method: metrics.histogram("http_request_duration_seconds", handler=handler, method=method)
        )
        self._count = cache(
            lambda handler, method, status: metrics.counter(
                "http_requests", handler=handler, method=method, status=status
            )
        )

    def answered(self, answer: HttpAnswer) -> None:
        if answer.path in _NOT_COUNTED:
            return
        handler, method = answer.path or NO_ROUTE, answer.method
        received, sent = self._route(handler)
        received.observe(answer.received)
        sent.observe(answer.sent)
        self._fine.observe(answer.seconds)
        coarse: Histogram = self._coarse(handler, method)
        coarse.observe(answer.seconds)
        count: Counter = self._count(handler, method, f"{answer.status // 100 or _LEFT}xx")
        count.inc()


def _route(metrics: Metrics, handler: str) -> tuple[Summary, Summary]:
    return (
        metrics.summary("http_request_size_bytes", handler=handler),
        metrics.summary("http_response_size_bytes", handler=handler),
    )
