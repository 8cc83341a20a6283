"""Spans of a decode worker, made of what its core is told and decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitserve.decode.effects import Fetched, FetchFailed
from splitserve.decode.jobs import DecodeJobs
from splitserve.decode.spans import DecodeSpans
from splitserve.engine import door
from splitserve.protocol.effects import Ask
from splitserve.protocol.messages import Cancel, KvFailed, KvLoaded, Preempted, Release
from splitserve.protocol.states import FailReason, FinishReason
from support.spans import CALLER, UNSAMPLED, Memory, WatchedDriver
from support.worker_cores import R1, SUBJECTS, amend, decode_job, identity, kv_ready, reserved, token


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def driver(memory: Memory) -> WatchedDriver:
    return WatchedDriver(DecodeJobs(identity(), SUBJECTS), DecodeSpans(memory.tracer, "w"))


def fetching(driver: WatchedDriver) -> None:
    driver.say(decode_job(trace=CALLER))
    driver.engine(reserved("a"))
    driver.say(kv_ready("a"))


def finish(driver: WatchedDriver, first: door.TokenEvent) -> None:
    driver.engine(first)
    driver.engine(token("a", 1, first.first_index + 1, (6,), FinishReason.LENGTH), door.Gone(("a", 1)))


def test_a_moved_prompt_is_a_transfer_and_then_a_decode_with_its_first_step(
    memory: Memory, driver: WatchedDriver
) -> None:
    fetching(driver)
    driver.now += 0.5
    driver.event(Fetched(("a", 1), 300, 3, "shm", 0.02))
    assert driver.published(KvLoaded, R1)[0].trace == CALLER
    assert [ask.message.trace for ask in driver.of(Ask) if isinstance(ask.message, Release)] == [CALLER]
    driver.now += 1.0
    finish(driver, replace(token("a", 1, 1, (5,)), queue_s=0.1, first_step_s=0.3))
    spans = memory.spans
    assert {name: span.parent for name, span in spans.items()} == {
        "kv_transfer": CALLER.span_id,
        "decode": CALLER.span_id,
        "queue": spans["decode"].id,
        "first_step": spans["decode"].id,
    }
    assert spans["kv_transfer"].seconds == pytest.approx(0.5, abs=1e-6)
    assert spans["kv_transfer"].attributes["splitserve.kv.bytes"] == 300
    assert spans["kv_transfer"].attributes["splitserve.kv.transport"] == "shm"
    assert spans["kv_transfer"].attributes["splitserve.prefill.worker"] == "p"
    assert spans["decode"].attributes["splitserve.decoded_tokens"] == 2
    assert spans["decode"].seconds == pytest.approx(1.0, abs=1e-6)
    assert spans["first_step"].seconds == pytest.approx(0.3, abs=1e-6)


def test_a_prompt_that_is_read_here_is_one_decode_with_its_prefill_in_it(memory: Memory, driver: WatchedDriver) -> None:
    driver.say(decode_job(trace=CALLER, source=None))
    driver.now += 2.0
    finish(driver, replace(token("a", 1, 0, (5,)), queue_s=0.5, prefill_s=1.0, cached_tokens=4))
    spans = memory.spans
    assert set(spans) == {"decode", "queue", "prefill"}
    assert spans["prefill"].attributes == {"splitserve.cached_tokens": 4}
    assert spans["decode"].seconds == pytest.approx(2.0, abs=1e-6)


def test_a_transfer_that_fails_is_a_failed_span_and_the_next_attempt_has_its_own(
    memory: Memory, driver: WatchedDriver
) -> None:
    fetching(driver)
    driver.event(FetchFailed(("a", 1), FailReason.FENCED, "reused"))
    assert driver.published(KvFailed, R1)[0].trace == CALLER
    driver.engine(door.Gone(("a", 1)))
    assert memory.spans["kv_transfer"].attributes["error.type"] == "fenced"
    assert memory.spans["kv_transfer"].failed
    driver.say(amend(source=None, trace=CALLER))
    driver.engine(token("a", 2, 0, (5,)), door.Gone(("a", 2)))
    assert memory.spans["decode"].attributes["splitserve.decode.attempt"] == 2


def test_a_preempted_answer_is_a_failed_span(memory: Memory, driver: WatchedDriver) -> None:
    driver.say(decode_job(trace=CALLER, source=None))
    driver.engine(token("a", 1, 0, (5,)), door.Preempted(("a", 1)))
    assert driver.published(Preempted, R1)[0].trace == CALLER
    assert memory.spans["decode"].attributes["error.type"] == "preempted"


def test_refused_cancelled_early_and_untraced_jobs_have_no_span(memory: Memory, driver: WatchedDriver) -> None:
    driver.say(decode_job("a", trace=CALLER, fingerprint="another"))
    driver.say(decode_job("b", trace=CALLER, slot=1))
    driver.say(Cancel("b", 7, 0, 1, "test"))
    driver.engine(door.Gone(("b", 1)))
    driver.say(decode_job("c", trace=UNSAMPLED, slot=2, source=None))
    driver.engine(token("c", 1, 0, (5,), FinishReason.LENGTH), door.Gone(("c", 1)))
    assert memory.spans == {}
