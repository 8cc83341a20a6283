from __future__ import annotations

import pytest

from splitserve.protocol.states import Role
from splitserve.router.gauges import Happened, reason_of
from splitserve.telemetry.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(Role.ROUTER, model_name="m", engine="r-0", max_model_len=4096)


@pytest.mark.parametrize(
    ("what", "series", "labels"),
    [
        ("resumes", "splitserve_resumes_total", {}),
        ("queued->cancelled", "splitserve_requests_cancelled_total", {"state": "queued"}),
        ("placed|split|asked", "splitserve_placements_total", {"decision": "split", "reason": "asked"}),
        ("replaced|decode|worker lost", "splitserve_replacements_total", {"phase": "decode", "reason": "worker_lost"}),
        ("replaced|prefill|moved", "splitserve_replacements_total", {"phase": "prefill", "reason": "moved"}),
        ("replaced|prefill|kv fenced", "splitserve_replacements_total", {"phase": "prefill", "reason": "kv_failed"}),
    ],
)
def test_what_happened_in_the_core_moves_its_series(
    metrics: Metrics, what: str, series: str, labels: dict[str, str]
) -> None:
    Happened(metrics).rose(what, 2)
    assert metrics.registry.get_sample_value(series, {"model_name": "m", "engine": "r-0", **labels}) == 2


def test_what_has_no_series_moves_none(metrics: Metrics) -> None:
    before = metrics.page()
    Happened(metrics).rose("queued->decoding", 1)
    assert metrics.page() == before


def test_a_cause_that_nobody_thought_of_is_other() -> None:
    assert reason_of("an eclipse") == "other"
