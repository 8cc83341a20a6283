"""Spans of a prefill worker, made of what its core is told and decides."""

from __future__ import annotations

import pytest

from splitserve.engine import door
from splitserve.prefill.jobs import PrefillJobs
from splitserve.prefill.spans import PrefillSpans
from splitserve.protocol.messages import Cancel, KvReady
from support.spans import CALLER, UNSAMPLED, Memory, WatchedDriver
from support.worker_cores import R1, SUBJECTS, identity, prefill_job, prefilled


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def driver(memory: Memory) -> WatchedDriver:
    core = PrefillJobs(identity(), SUBJECTS, new_token=lambda: "t" * 32)
    return WatchedDriver(core, PrefillSpans(memory.tracer, "w"))


def test_a_prompt_is_a_span_with_its_queue_and_its_computation_in_it(memory: Memory, driver: WatchedDriver) -> None:
    driver.say(prefill_job(trace=CALLER))
    driver.now += 1.0
    driver.engine(prefilled())
    spans = memory.spans
    assert {name: span.parent for name, span in spans.items()} == {
        "prefill": CALLER.span_id,
        "queue": spans["prefill"].id,
        "compute": spans["prefill"].id,
    }
    assert {span.trace_id for span in spans.values()} == {CALLER.trace_id}
    assert spans["queue"].seconds == pytest.approx(0.1, abs=1e-6)
    assert spans["compute"].seconds == pytest.approx(0.2, abs=1e-6)
    assert spans["prefill"].seconds == pytest.approx(1.0, abs=1e-6)
    assert spans["prefill"].attributes == {
        "splitserve.request.id": "a",
        "splitserve.worker": "w",
        "splitserve.prefill.attempt": 1,
        "splitserve.prompt_tokens": 10,
    }


def test_kv_ready_carries_the_trace_of_its_job_whether_or_not_it_is_recorded(driver: WatchedDriver) -> None:
    for rid, trace in (("a", CALLER), ("b", UNSAMPLED)):
        driver.say(prefill_job(rid, trace=trace))
        driver.engine(prefilled(rid))
        assert driver.published(KvReady, R1)[0].trace == trace


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (door.Rejected(("a", 1), "no room"), "rejected"),
        (door.Failed(("a", 1), "broken"), "failed"),
        (None, "cancelled"),
    ],
)
def test_a_prompt_that_is_not_read_to_its_end_is_a_failed_span(
    memory: Memory, driver: WatchedDriver, end: door.Event | None, error: str
) -> None:
    driver.say(prefill_job(trace=CALLER))
    if end is None:
        driver.say(Cancel("a", 7, 1, 0, "test"))
    else:
        driver.engine(end)
    assert memory.spans["prefill"].attributes["error.type"] == error
    assert memory.spans["prefill"].failed


def test_refused_and_untraced_jobs_have_no_span(memory: Memory, driver: WatchedDriver) -> None:
    driver.say(prefill_job("a", trace=CALLER, fingerprint="another"))
    for rid, trace in (("b", UNSAMPLED), ("probe-c", prefill_job().trace)):
        driver.say(prefill_job(rid, trace=trace))
        driver.engine(prefilled(rid))
    assert memory.spans == {}
