"""What an ended request adds to the router's series."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from splitserve.errors import (
    AuthenticationFailed,
    BusUnavailable,
    ContextTooLong,
    EngineFailed,
    NoWorkers,
    SplitserveError,
)
from splitserve.router.metrics import RouterMetrics
from splitserve.router.observe import HttpAnswer, Progress, RequestEnd
from splitserve.router.refusals import TooManyRequests, TooManyTokens, WaitedTooLong, refusal_reason

DONE = RequestEnd(
    "finished", 2.0, finish_reasons=("stop", "length"), prompt_tokens=(30,), cached_tokens=16,
    generation_tokens=(5, 9), n=2, max_tokens=9, first_token_s=0.5, last_token_s=1.5, detokenise_s=0.01,
    stages=({"place": 0.02, "reserve": 0.03, "prefill_queue": 0.1, "prefill": 0.3, "ttft": 0.46},), preemptions=1,
)  # fmt: skip


class Page:
    """Ends that were told, and what the series then are."""

    def __init__(self, *ends: RequestEnd, tokenise_s: float = 0.0) -> None:
        self.metrics = RouterMetrics(model_name="m", engine="r-0", max_model_len=4096)
        for end in ends:
            request = self.metrics.request("/v1/completions")
            request.tokenised(tokenise_s)
            request.end(end)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.metrics.metrics.registry.get_sample_value(name, {"model_name": "m", "engine": "r-0", **labels})


def test_tokens_are_counted_as_they_come_and_by_source() -> None:
    page = Page(DONE)
    assert page("vllm:generation_tokens_total") == page("vllm:prompt_tokens_total") == 0
    for by in (Progress(1, 30, 16), Progress(13, 0, 0)):
        page.metrics.progressed(by)
    assert page("vllm:prompt_tokens_total") == 30
    assert page("vllm:prompt_tokens_by_source_total", source="local_compute") == 14
    assert page("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 16
    assert page("vllm:prompt_tokens_cached_by_source_total", source="device") == 16
    assert page("vllm:generation_tokens_total") == 14
    assert page("vllm:request_prefill_kv_computed_tokens_sum") == 14
    assert page("vllm:request_max_num_generation_tokens_sum") == 9
    assert page("vllm:request_num_preemptions_sum") == 1


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_the_routers_own_page_tells_of_its_process_and_the_joined_one_does_not(accept: str) -> None:
    metrics = Page(DONE).metrics
    refreshed: list[str] = []
    metrics.refresh = lambda: refreshed.append("now")
    own, _ = metrics.answer(accept)
    assert refreshed
    assert b"\nprocess_resident_memory_bytes " in own
    assert b"\nvllm:generation_tokens_total{" in own
    assert b"process_" not in metrics.page()


def test_answers_are_counted_by_how_they_ended() -> None:
    left = replace(DONE, outcome="cancelled", finish_reasons=("stop",))
    lost = replace(DONE, outcome="failed", code="engine_failed", finish_reasons=())
    page = Page(DONE, left, lost)
    reasons = ("stop", "length", "abort", "error", "repetition")
    found = {reason: page("vllm:request_success_total", finished_reason=reason) for reason in reasons}
    assert found == {"stop": 2, "length": 1, "abort": 1, "error": 2, "repetition": 0}
    assert page("splitserve_requests_failed_total", code="engine_failed") == 1


def test_prompts_read_side_by_side_are_no_longer_than_their_request() -> None:
    slow = {"prefill_queue": 0.4, "prefill": 0.5, "ttft": 0.95}
    page = Page(replace(DONE, stages=(slow, *DONE.stages, slow)))
    assert page("vllm:request_prefill_time_seconds_sum") == pytest.approx(0.3)
    assert page("vllm:request_queue_time_seconds_sum") == pytest.approx(0.1)
    assert page("vllm:request_inference_time_seconds_sum") == pytest.approx(0.3 + 1.0)


def test_the_answers_of_a_request_that_never_got_a_token_are_aborted() -> None:
    page = Page(replace(DONE, outcome="cancelled", first_token_s=None, generation_tokens=(0, 0), finish_reasons=()))
    assert page("vllm:request_success_total", finished_reason="abort") == 2


def test_the_stages_of_the_first_token_sum_to_it() -> None:
    page = Page(DONE, tokenise_s=0.02)
    names = [
        dict(sample.labels)["stage"]
        for metric in page.metrics.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "splitserve_stage_seconds_count" and sample.value
    ]
    total = sum(page("splitserve_stage_seconds_sum", stage=stage) or 0 for stage in names)
    assert total == pytest.approx(0.5 + 0.01)
    assert page("splitserve_stage_seconds_sum", stage="other") == pytest.approx(0.5 - 0.02 - 0.45)


def test_the_first_gap_is_told_of_requests_whose_kv_was_moved() -> None:
    moved = {"ttft": 0.46, "handle": 0.01, "decode_queue": 0.02, "transfer": 0.03, "first_step": 0.04,
             "first_gap": 0.15, "gap_other": 0.05}  # fmt: skip
    page = Page(replace(DONE, stages=(moved,)), DONE)
    assert page("splitserve_first_gap_seconds_count") == 1
    parts = ("handle", "decode_queue", "transfer", "first_step", "gap_other")
    assert sum(page("splitserve_stage_seconds_sum", stage=part) or 0 for part in parts) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TooManyRequests("x"), "max_num_queued_reqs"),
        (TooManyTokens("x"), "max_num_queued_tokens"),
        (WaitedTooLong("x"), "queue_timeout"),
        (NoWorkers("x"), "no_workers"),
        (BusUnavailable("x"), "unavailable"),
        (ContextTooLong("x"), "context_length_exceeded"),
        (AuthenticationFailed("x"), "invalid_api_key"),
        (EngineFailed("x"), ""),
    ],
)
def test_an_error_is_a_refusal_unless_the_cluster_lost_the_request(error: SplitserveError, reason: str) -> None:
    assert refusal_reason(error) == reason


def test_a_refusal_is_no_failure_and_the_bounds_have_vllms_counter_too() -> None:
    refused = RequestEnd("failed", 0.1, "overloaded", "max_num_queued_reqs")
    page = Page(refused)
    page.metrics.refused(AuthenticationFailed("no key"))
    assert page("splitserve_requests_refused_total", reason="max_num_queued_reqs") == 1
    assert page("splitserve_requests_refused_total", reason="invalid_api_key") == 1
    assert page("splitserve_requests_failed_total", code="overloaded") == 0
    value = page.metrics.metrics.registry.get_sample_value
    assert value("vllm:admission_rejections_total", {"model_name": "m", "reason": "max_num_queued_reqs"}) == 1


def answered(**changes: Any) -> HttpAnswer:
    return replace(HttpAnswer("POST", "/v1/completions", 200, 0.2, received=40, sent=900), **changes)


def test_http_answers_are_counted_by_route_method_and_class_of_status() -> None:
    metrics = RouterMetrics(model_name="m", engine="r-0", max_model_len=4096)
    for answer in (answered(), answered(status=404), answered(status=0), answered(path="", status=404)):
        metrics.answered(answer)
    value = metrics.metrics.registry.get_sample_value

    def count(handler: str, status: str) -> float | None:
        return value("http_requests_total", {"handler": handler, "method": "POST", "status": status})

    assert (count("/v1/completions", "2xx"), count("/v1/completions", "4xx"), count("none", "4xx")) == (1, 2, 1)
    assert value("http_request_size_bytes_sum", {"handler": "/v1/completions"}) == 120
    assert value("http_response_size_bytes_sum", {"handler": "none"}) == 900
    assert value("http_request_duration_highr_seconds_count", {}) == 4


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/metrics/router"])
def test_what_probes_and_scrapers_ask_is_not_counted(path: str) -> None:
    metrics = RouterMetrics(model_name="m", engine="r-0", max_model_len=4096)
    metrics.answered(answered(method="GET", path=path))
    assert metrics.metrics.registry.get_sample_value("http_request_duration_highr_seconds_count", {}) == 0
