"""What fetches add to the metrics of a decode worker. Children are resolved once."""

from __future__ import annotations

from splitserve.kv.transfer.base import FetchResult
from splitserve.protocol.states import FailReason
from splitserve.telemetry.metrics import Metrics
from splitserve.telemetry.own import TRANSPORTS


class FetchMetrics:
    """Tokens are those of the prompt whose KV was not cached here."""

    def __init__(self, metrics: Metrics) -> None:
        self._seconds = {t: metrics.histogram("splitserve_kv_transfer_seconds", transport=t) for t in TRANSPORTS}
        self._bytes = {t: metrics.counter("splitserve_kv_transfer_bytes", transport=t) for t in TRANSPORTS}
        self._blocks = {t: metrics.counter("splitserve_kv_transfer_blocks", transport=t) for t in TRANSPORTS}
        self._failed = {r: metrics.counter("splitserve_kv_failed", reason=r) for r in FailReason}
        self._fenced = metrics.counter("splitserve_kv_fenced")
        self._asked = metrics.counter("vllm:external_prefix_cache_queries")
        self._got = metrics.counter("vllm:external_prefix_cache_hits")

    def asked(self, tokens: int) -> None:
        self._asked.inc(tokens)

    def got(self, tokens: int, result: FetchResult) -> None:
        self._got.inc(tokens)
        if result.transport in self._seconds:  # not where nothing had to be moved
            self._seconds[result.transport].observe(result.seconds)
            self._bytes[result.transport].inc(result.bytes)
            self._blocks[result.transport].inc(result.blocks)

    def failed(self, reason: FailReason) -> None:
        self._failed[reason].inc()
        self._fenced.inc(reason is FailReason.FENCED)
