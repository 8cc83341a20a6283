from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from splitserve.protocol.states import Role
from splitserve.telemetry.families import Kind, families
from splitserve.telemetry.metrics import Metrics


def made(role: Role) -> Metrics:
    return Metrics(role, model_name="m", engine="x-0", max_model_len=4096)


def test_a_family_stands_in_the_table_once() -> None:
    names = [family.name for family in families(4096)]
    assert len(names) == len(set(names))


def test_token_buckets_end_at_the_models_length() -> None:
    by_name = {family.name: family for family in families(2048)}
    assert by_name["vllm:request_prompt_tokens"].buckets == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


def test_histograms_have_buckets_and_nothing_else_has() -> None:
    for family in families(4096):
        assert bool(family.buckets) == (family.kind is Kind.HISTOGRAM), family.name


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
