from __future__ import annotations

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from splitserve.protocol.states import Role
from splitserve.telemetry.metrics import Metrics, Tally


def made(role: Role) -> Metrics:
    return Metrics(role, model_name="m", engine="x-0", max_model_len=4096)


@pytest.mark.parametrize("role", list(Role))
def test_a_page_has_the_families_of_its_role_and_parses(role: Role) -> None:
    page = made(role).page().decode()
    found = {family.name for family in text_string_to_metric_families(page)}
    assert ("vllm:time_to_first_token_seconds" in found) == (role is Role.ROUTER)
    assert ("vllm:num_requests_running" in found) == (role is not Role.ROUTER)
    assert ("splitserve_kv_leases" in found) == (role is Role.PREFILL)


def test_a_child_moves_its_series() -> None:
    metrics = made(Role.DECODE)
    metrics.counter("splitserve_kv_transfer_bytes", transport="shm").inc(4096)
    line = 'splitserve_kv_transfer_bytes_total{engine="x-0",model_name="m",transport="shm"} 4096.0'
    assert line in metrics.page().decode()


def test_a_family_of_another_role_cannot_be_moved() -> None:
    with pytest.raises(KeyError):
        made(Role.PREFILL).counter("vllm:generation_tokens")


def test_a_family_asked_for_as_another_kind_is_an_error() -> None:
    with pytest.raises(TypeError, match="is a Counter"):
        made(Role.DECODE).gauge("vllm:num_preemptions")


def test_series_known_beforehand_are_exported_from_the_start() -> None:
    page = made(Role.DECODE).page().decode()
    for line in (
        'vllm:num_requests_waiting_by_reason{engine="x-0",model_name="m",reason="deferred"} 0.0',
        'vllm:engine_sleep_state{engine="x-0",model_name="m",sleep_state="awake"} 1.0',
        'splitserve_kv_transfer_bytes_total{engine="x-0",model_name="m",transport="tcp"} 0.0',
    ):
        assert line in page


def test_families_that_name_no_engine_are_exported_without_one() -> None:
    page = made(Role.ROUTER).page().decode()
    assert 'vllm:admission_rejections_total{model_name="m",reason="max_num_queued_reqs"} 0.0' in page
    assert "http_request_duration_highr_seconds_count 0.0" in page


def test_when_a_series_was_created_is_not_told() -> None:
    for role in Role:
        assert "_created" not in made(role).answer("")[0].decode()


@pytest.mark.parametrize(
    ("accept", "content_type", "end"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8", "\n"),
        ("text/html, */*;q=0.1", "text/plain; version=0.0.4; charset=utf-8", "\n"),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "application/openmetrics-text; version=1.0.0", "# EOF\n"),
    ],
)  # fmt: skip
def test_a_page_comes_in_the_format_that_was_asked_for(accept: str, content_type: str, end: str) -> None:
    page, told = made(Role.DECODE).answer(accept)
    assert told.startswith(content_type)
    assert page.decode().endswith(end)


# what Prometheus 2.53 sends, and 2.42
@pytest.mark.parametrize("more", [";escaping=underscores;q=0.5", ";q=0.5", ""])
def test_a_name_keeps_its_colon_in_every_format(more: str) -> None:
    for accept in (f"application/openmetrics-text;version=1.0.0{more}", f"text/plain;version=0.0.4{more}"):
        lines = made(Role.DECODE).answer(accept)[0].decode().splitlines()
        assert any(line.startswith("vllm:kv_cache_usage_perc{") for line in lines)
        assert not any(line.startswith("vllm_") for line in lines)


def test_an_openmetrics_page_parses_strictly() -> None:
    for role in Role:
        page, _ = made(role).answer("application/openmetrics-text")
        assert list(openmetrics.text_string_to_metric_families(page.decode()))


def test_series_of_the_process_itself_stay_out_of_the_page_that_is_joined() -> None:
    metrics = made(Role.PREFILL)
    assert "process_resident_memory_bytes" in metrics.answer("")[0].decode()
    assert "process_resident_memory_bytes" not in metrics.page().decode()


def test_older_names_are_exported_only_when_asked_for() -> None:
    assert "gpu_cache_usage_perc" not in made(Role.DECODE).page().decode()
    metrics = Metrics(Role.DECODE, model_name="m", engine="x-0", max_model_len=4096, legacy=True)
    metrics.gauge("vllm:kv_cache_usage_perc").set(0.25)
    metrics.counter("vllm:prefix_cache_hits").inc(7)
    page = metrics.page().decode()
    for line in (
        'vllm:gpu_cache_usage_perc{model_name="m"} 0.25',
        'vllm:gpu_prefix_cache_hits_total{model_name="m"} 7.0',
        'vllm:num_requests_swapped{model_name="m"} 0.0',
    ):
        assert line in page


def test_the_older_name_of_a_histogram_has_its_buckets() -> None:
    metrics = Metrics(Role.ROUTER, model_name="m", engine="r", max_model_len=4096, legacy=True)
    metrics.histogram("vllm:inter_token_latency_seconds").observe(0.03)
    page = metrics.page().decode()
    assert 'vllm:time_per_output_token_seconds_bucket{le="0.05",model_name="m"} 1.0' in page
    assert 'vllm:time_per_output_token_seconds_count{model_name="m"} 1.0' in page


def test_a_tally_adds_to_its_histogram_at_refresh_what_it_would_have_observed() -> None:
    told, kept = made(Role.ROUTER), made(Role.ROUTER)
    name = "vllm:inter_token_latency_seconds"
    tally = Tally(kept.histogram(name))
    for round_ in ((0.01, 0.013, 0.025, 1e9), (0.01, 0.0)):
        for seconds in round_:
            told.histogram(name).observe(seconds)
            tally.observe(seconds)
        tally.refresh()
        assert kept.page() == told.page()
