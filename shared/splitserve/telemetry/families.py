"""The table of metric families: name, type, labels, buckets and the one role that owns each.

`engine` is the stable name of the process that owns the series. Read more in docs/metrics.md, which a test holds against
this table.
"""

from __future__ import annotations

from splitserve.telemetry import own, vllm
from splitserve.telemetry.family import Family as Family
from splitserve.telemetry.family import Kind as Kind
from splitserve.telemetry.family import Owner as Owner
from splitserve.telemetry.family import Series as Series


def families(max_model_len: int) -> tuple[Family, ...]:
    """The whole table; buckets that count the tokens of a request end at `max_model_len`."""
    return (
        *vllm.request_families(max_model_len),
        *vllm.http_families(),
        *vllm.engine_families(),
        *own.request_families(),
        *own.worker_families(),
        *own.kv_families(),
        *own.process_families(),
    )
