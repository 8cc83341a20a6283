"""The core as a whole: admission, outages, liveness, the queue, and what a fault of its own costs."""

from __future__ import annotations

import pytest

from splitserve.protocol.effects import Ask, BusDown, BusUp, NoAnswer, Received, Unanswered
from splitserve.protocol.messages import (
    Accepted,
    Cancel,
    DecodeJob,
    Digest,
    DigestRow,
    Ping,
    PrefillJob,
    Resume,
    TokenFrame,
)
from splitserve.protocol.params import SamplingParams
from splitserve.protocol.states import FinishReason, RefuseReason, RequestState
from splitserve.router.effects import Crashed, Deliver, Submit
from splitserve.router.generation import Done, Submission
from splitserve.router.lifecycle import Lifecycle
from support.router_bench import Bench, worker_beat


def submission(rid: str = "x", model: str = "m") -> Submission:
    return Submission(rid, model, (1, 2, 3), SamplingParams(max_tokens=5), (0,), 600.0)


# --- admission ---


def test_a_model_that_nobody_serves_is_refused_before_anything_is_sent():
    bench = Bench()
    error = bench.core.refusal(submission(model="other"), bench.now)
    assert type(error).__name__ == "NoWorkers"
    bench.send(Submit(submission(model="other")))
    assert bench.error("x") == "NoWorkers"
    assert not bench.asks


def test_while_the_bus_is_down_requests_are_refused():
    bench = Bench()
    bench.send(BusDown())
    assert type(bench.core.refusal(submission(), bench.now)).__name__ == "BusUnavailable"
    bench.send(BusUp())
    assert bench.core.refusal(submission(), bench.now) is None


# --- the queue ---


def test_those_behind_one_that_finds_no_room_wait_their_turn():
    bench = Bench(split="never", decodes=1)
    bench.submit("a")
    bench.refuse(DecodeJob)
    bench.submit("b")
    bench.submit("c")
    assert not bench.asked(DecodeJob)
    bench.run(0.3)
    assert [job.rid for _, job in bench.asked(DecodeJob)] == ["a", "b", "c"]


def test_a_lower_priority_number_goes_first():
    bench = Bench(split="never", decodes=1)
    bench.submit("a")
    bench.refuse(DecodeJob)
    bench.submit("late", priority=-1)
    bench.run(0.3)
    assert [job.rid for _, job in bench.asked(DecodeJob)] == ["late", "a"]


def test_one_that_waits_for_a_prefill_worker_holds_up_nobody():
    bench = Bench(split="never", prefills=0)
    bench.submit("split", split="always")
    assert not bench.asked(DecodeJob)
    bench.submit("local")
    assert [job.rid for _, job in bench.asked(DecodeJob)] == ["local"]
    bench.receive(worker_beat("p0", "prefill"))
    assert [job.rid for _, job in bench.asked(DecodeJob)] == ["local", "split"]


def test_requests_beyond_what_a_pool_may_promise_wait_without_being_asked_for():
    bench = Bench(split="never", decodes=1)
    for i in range(9):
        bench.submit(f"r{i}", ids=1600)  # 100 blocks and 4 of answer, of 1000
    assert len(bench.asked(DecodeJob)) == 9
    bench.submit("r9", ids=1600)
    assert len(bench.asked(DecodeJob)) == 9
    bench.leave("r0")
    assert bench.asked(DecodeJob)[-1][1].rid == "r9"


def test_a_prefix_that_was_placed_before_attracts_its_next_request():
    bench = Bench(split="never", decodes=3)
    bench.submit("a", ids=640)
    ask, _ = bench.take(DecodeJob)
    bench.answer(ask, Accepted())
    home = ask.subject
    bench.leave("a")
    for rid in ("b", "c"):
        bench.submit(rid, ids=640)
        ask, _ = bench.take(DecodeJob)
        assert ask.subject == home
        bench.answer(ask, Accepted())
        bench.leave(rid)


# --- liveness ---


def test_a_silent_worker_with_work_is_pinged_and_its_request_moves_when_nobody_responds():
    bench = Bench()
    bench.decoding()
    bench.mute.add("d0")
    bench.run(0.4)
    ask, _ = bench.take(Ping)
    assert ".d0." in ask.subject
    bench.send(Unanswered(ask.tag, NoAnswer.NO_RESPONDERS))
    assert ".d1." in bench.take(DecodeJob)[0].subject


def test_a_frozen_worker_is_dead_after_two_seconds():
    bench = Bench()
    bench.decoding()
    bench.mute.add("d0")
    bench.run(1.9)
    assert not bench.asked(DecodeJob)
    bench.run(0.2)
    assert ".d1." in bench.take(DecodeJob)[0].subject


def test_a_lost_prefill_worker_whose_handle_is_out_moves_nothing():
    bench = Bench()
    bench.transferring()
    bench.receive(worker_beat("p0", "prefill", incarnation=2))
    assert bench.state() is RequestState.TRANSFERRING
    assert not bench.asked(PrefillJob)


def test_a_digest_of_a_former_life_is_not_believed():
    bench = Bench()
    decode = bench.decoding()
    bench.receive(worker_beat("d1", "decode", incarnation=2))
    bench.receive(Digest("d1", "decode", 1, 0, (DigestRow("a", decode.da, "running", (9,)),)))
    assert not bench.published(Cancel)


# --- our own bus ---


def test_unanswered_jobs_are_asked_again_under_the_same_numbers_after_an_outage():
    bench = Bench(split="never")
    bench.submit()
    ask, job = bench.take(DecodeJob)
    bench.send(BusDown())
    bench.send(Unanswered(ask.tag, NoAnswer.DISCONNECTED))
    assert not bench.asked(DecodeJob)
    bench.now += 5
    bench.send(BusUp())
    again = bench.accept(DecodeJob)
    assert again == job
    assert bench.state() is RequestState.PREFILLING


def test_a_time_out_of_a_question_from_before_the_outage_is_not_the_new_ones():
    bench = Bench(split="never")
    bench.submit()
    ask, job = bench.take(DecodeJob)
    bench.send(BusDown())
    bench.send(BusUp())
    bench.send(Unanswered(ask.tag, NoAnswer.TIMEOUT))
    assert bench.accept(DecodeJob).da == job.da
    assert bench.state() is RequestState.PREFILLING


def test_after_an_outage_every_live_request_is_asked_for():
    bench = Bench()
    decode = bench.decoding()
    bench.send(BusDown())
    bench.send(BusUp())
    assert [row.slot for row in bench.take(Resume)[1].rows] == [decode.slot]


def test_a_disconnected_question_while_the_bus_is_up_is_asked_again_soon():
    bench = Bench(split="never")
    bench.submit()
    first = bench.unanswered(DecodeJob, NoAnswer.DISCONNECTED)
    assert not bench.asked(DecodeJob)
    bench.run(0.15)
    assert bench.take(DecodeJob)[1].da == first.da


def test_an_outage_of_15_seconds_ends_every_request():
    bench = Bench()
    bench.decoding()
    bench.send(BusDown())
    bench.run(14.9, beats=False)
    assert bench.done() is None
    bench.run(0.2, beats=False)
    assert bench.error() == "BusUnavailable"


def test_waits_for_others_pause_while_our_bus_is_sick_and_deadlines_do_not():
    bench = Bench()
    bench.prefilling(timeout_s=8.0)
    bench.send(BusDown())
    bench.run(5.0, beats=False)
    bench.send(BusUp())
    bench.run(1.9)
    assert not bench.asked(PrefillJob)
    bench.run(1.5)
    assert bench.error() == "DeadlineExceeded"


def test_a_router_that_stood_still_ends_nothing_and_judges_nobody_before_it_hears_itself():
    bench = Bench()
    bench.decoding()
    asked = len(bench.asked(DecodeJob))
    bench.now += 10.0
    bench.tick()
    assert bench.done() is None
    assert len(bench.asked(DecodeJob)) == asked


# --- itself ---


def test_while_anything_lives_there_is_a_timer_within_its_workers_patience():
    bench = Bench()
    bench.submit()
    for _ in range(10):
        at = bench.core.wake_at()
        assert at is not None
        assert at - bench.now < 5.0
        bench.now = max(bench.now, at)
        bench.beats()
        bench.tick()


def test_a_fault_of_the_core_costs_only_the_request_that_it_met(monkeypatch: pytest.MonkeyPatch):
    bench = Bench(split="never", decodes=1)
    jobs = {}
    for rid in ("a", "b"):
        bench.submit(rid)
        jobs[rid] = bench.accept(DecodeJob)
    row = Lifecycle.row

    def faulty(self: Lifecycle, choice: int, tokens: object) -> None:
        if self.request.rid == "a":
            raise ZeroDivisionError("told to")
        row(self, choice, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(Lifecycle, "row", faulty)
    frame = TokenFrame("d0", 1, 1, (jobs["a"].slot, jobs["b"].slot), (1, 1), (0, 0), (1, 1), (0, 0), (5, 6))
    commands = bench.core.handle(Received(frame), bench.now)
    crashed = [c for c in commands if isinstance(c, Crashed)]
    assert [(c.rid, type(c.error)) for c in crashed] == [("a", ZeroDivisionError)]
    ends = [c for c in commands if isinstance(c, Deliver) and isinstance(c.event, Done)]
    assert [c.rid for c in ends] == ["a"]
    assert set(bench.core.live) == {"b"}


def test_a_fault_within_a_digest_costs_only_the_request_that_it_met(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(split="never", decodes=1)
    jobs: dict[str, DecodeJob] = {}
    for rid in ("a", "b"):
        bench.submit(rid)
        jobs[rid] = bench.accept(DecodeJob)

    def faulty(self: Lifecycle) -> None:
        if self.request.rid == "a":
            raise ZeroDivisionError("told to")

    monkeypatch.setattr(Lifecycle, "loaded", faulty)
    rows = tuple(DigestRow(rid, job.da, "running", (3,), job.slot) for rid, job in jobs.items())
    commands = bench.core.handle(Received(Digest("d0", "decode", 1, 0, rows)), bench.now)
    assert [c.rid for c in commands if isinstance(c, Crashed)] == ["a"]
    assert set(bench.core.live) == {"b"}
    resumes = [c.message for c in commands if isinstance(c, Ask) and isinstance(c.message, Resume)]
    assert [row.rid for resume in resumes for row in resume.rows] == ["b"]


def test_after_the_last_end_nothing_is_kept():
    bench = Bench()
    decode = bench.decoding()
    bench.row(decode.slot, decode.da, 1, 2, finish=FinishReason.STOP)
    bench.submit("b")
    bench.refuse(DecodeJob, RefuseReason.TOO_LONG)
    bench.refuse(DecodeJob, RefuseReason.TOO_LONG)
    bench.run(3.5)  # a Renew was due 3 s after the hand-over
    assert bench.core.held == {"lives": 0, "slots": 0, "timers": 0}
    assert bench.core.waiting.requests == bench.core.waiting.tokens == 0
    assert all(worker.idle for worker in bench.core.fleet)


def test_the_stages_of_a_split_request_sum_to_its_first_token_and_first_gap():
    bench = Bench()
    bench.submit()
    bench.now += 0.01
    bench.accept(DecodeJob)
    prefill = bench.accept(PrefillJob)
    bench.now += 0.05
    bench.kv_ready(prefill)
    decode = bench.core.lives()["a"].request.decode
    assert decode is not None
    bench.kv_loaded(decode.job)
    bench.now += 0.02
    bench.row(decode.slot, decode.da, 1, 2, first=True)
    bench.now += 0.01
    bench.row(decode.slot, decode.da, 2, 3, finish=FinishReason.STOP)
    done = bench.done()
    assert done is not None
    s = done.stages
    assert s["ttft"] == pytest.approx(0.06)
    ttft_parts = s["place"] + s["reserve"] + s["prefill_bus"] + s["prefill_queue"] + s["prefill"] + s["other"]
    assert s["ttft"] == pytest.approx(ttft_parts)
    parts = s["handle"] + s["decode_queue"] + s["transfer"] + s["first_step"] + s["gap_other"]
    assert s["first_gap"] == pytest.approx(parts) == pytest.approx(0.02)
    assert s["e2e"] == pytest.approx(0.09)


def test_records_rise_in_number_and_end_with_the_end():
    bench = Bench()
    decode = bench.decoding()
    bench.row(decode.slot, decode.da, 1, 2, finish=FinishReason.STOP)
    assert [r.seq for r in bench.records] == list(range(1, len(bench.records) + 1))
    last = bench.records[-1]
    assert (last.state, last.prefill, last.decode, last.n_out) == (RequestState.FINISHED, "p0", "d0", 2)
    assert last.row().final
