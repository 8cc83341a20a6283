"""The request state table of the protocol, row by row."""

from __future__ import annotations

import pytest

from splitserve.protocol.effects import NoAnswer
from splitserve.protocol.messages import (
    Accepted,
    Amend,
    Cancel,
    DecodeJob,
    DigestRow,
    FinAck,
    KvReady,
    Preempted,
    PrefillJob,
    Refused,
    Release,
    ReleaseAnswer,
    Renew,
    Resume,
    ResumeAnswer,
)
from splitserve.protocol.states import FailReason, FinishReason, RefuseReason, RequestState
from splitserve.router.refusals import TooManyRequests
from splitserve.router.rules import Rules
from support.router_bench import Bench, worker_beat

S = RequestState


# --- queued ---


def test_decode_is_reserved_before_prefill_is_asked():
    bench = Bench()
    bench.submit()
    assert not bench.asked(PrefillJob)
    decode = bench.accept(DecodeJob)
    _, prefill = bench.asked(PrefillJob)[0]
    assert decode.source is not None
    assert (decode.source.worker, decode.pa) == ("p0", prefill.pa)
    assert prefill.notify == ("ss1.test.r.r-life.ev", "ss1.test.w.d0.kv")
    bench.accept(PrefillJob)
    assert bench.state() is S.PREFILLING


def test_a_local_job_is_prefilling_from_its_acceptance_to_its_first_token():
    bench = Bench(split="never")
    decode = bench.reserved()
    assert decode.source is None
    assert bench.state() is S.PREFILLING
    assert not bench.asked(PrefillJob)
    bench.row(decode.slot, decode.da, 0, 11)
    assert bench.state() is S.DECODING


def test_a_burst_is_shared_out_by_what_was_promised_before_anybody_has_answered():
    bench = Bench(split="auto", decodes=1)
    for rid in "abcdefghijkl":
        bench.submit(rid, ids=1000)
    split = [job.source is not None for _, job in bench.asked(DecodeJob)]
    assert split[0] is False  # nothing else to do there
    assert split[1] is True
    assert split.count(False) > 1  # not all the others to the one worker that seemed free


def test_a_prompt_that_decode_must_read_after_all_counts_as_waiting_there():
    bench = Bench()
    decode, _ = bench.prefilling()
    worker = bench.core.fleet.get("d0")
    assert worker is not None
    assert worker.own.tokens == 0
    bench.run(2.1)
    _, amend = bench.take(Amend)
    assert amend.source is None
    assert worker.own.tokens == len(decode.ids)
    bench.leave()
    assert worker.own.tokens == 0


def test_a_refusal_is_followed_by_the_next_worker_under_the_next_number():
    bench = Bench()
    bench.submit()
    first = bench.refuse(DecodeJob)
    ask, second = bench.take(DecodeJob)
    assert (first.da, second.da) == (1, 2)
    assert ".d1." in ask.subject
    assert bench.state() is S.QUEUED
    assert not bench.published(Cancel)


def test_a_worker_that_refused_is_not_asked_again_before_its_time():
    bench = Bench(decodes=1)
    bench.submit()
    bench.refuse(DecodeJob)
    bench.run(0.1)
    assert not bench.asked(DecodeJob)
    bench.run(0.2)
    assert len(bench.asked(DecodeJob)) == 1


def test_when_all_refuse_for_the_queue_time_the_request_fails_as_overloaded():
    bench = Bench(decodes=1)
    bench.submit()
    for _ in range(400):
        if bench.asked(DecodeJob):
            bench.refuse(DecodeJob)
        bench.run(0.1, step=0.1)
        if bench.done():
            break
    assert bench.error() == "WaitedTooLong"
    assert bench.state() is S.FAILED


def test_a_request_that_no_worker_can_ever_hold_is_told_so_at_once():
    bench = Bench()
    bench.submit()
    bench.refuse(DecodeJob, RefuseReason.TOO_LONG)
    bench.refuse(DecodeJob, RefuseReason.TOO_LONG)
    assert bench.error() == "ContextTooLong"


def test_workers_of_another_model_refuse_by_name_and_the_reason_reaches_the_client():
    bench = Bench()
    bench.submit()
    bench.refuse(DecodeJob, RefuseReason.MISMATCH)
    bench.refuse(DecodeJob, RefuseReason.MISMATCH)
    done = bench.done()
    assert done is not None
    assert bench.error() == "NoWorkers"
    assert "said mismatch" in str(done.error)


def test_a_decode_worker_that_does_not_answer_is_cancelled_and_another_is_asked():
    bench = Bench()
    bench.submit()
    job = bench.unanswered(DecodeJob)
    assert [(w, c.da) for w, c in bench.published(Cancel)] == [("d0", job.da)]
    ask, second = bench.take(DecodeJob)
    assert ".d1." in ask.subject
    assert second.da == job.da + 1


def test_a_row_of_the_current_attempt_is_the_lost_answer_too():
    bench = Bench(split="never")
    bench.submit()
    _, job = bench.take(DecodeJob)
    bench.row(job.slot, job.da, 0, 5)
    assert bench.state() is S.DECODING
    assert bench.tokens() == [5]


def test_kv_ready_is_the_lost_answer_of_prefill_too():
    bench = Bench()
    bench.reserved()
    _, prefill = bench.take(PrefillJob)
    bench.kv_ready(prefill, 77)
    assert bench.state() is S.TRANSFERRING
    assert bench.tokens() == [77]


# --- prefilling ---


def test_the_first_token_reaches_the_client_before_decode_has_loaded():
    bench = Bench()
    bench.transferring()
    assert bench.tokens() == [1000]
    assert bench.state() is S.TRANSFERRING


@pytest.mark.parametrize("how", ["refused", "timeout", "no progress"])
def test_another_prefill_worker_is_asked_under_a_new_number_and_decode_is_amended(how: str):
    bench = Bench(prefills=2)
    decode = bench.reserved()
    if how == "refused":
        old = bench.refuse(PrefillJob)
    elif how == "timeout":
        old = bench.unanswered(PrefillJob)
    else:
        old = bench.accept(PrefillJob)
        bench.run(2.1)
    _, amend = bench.take(Amend)
    ask, new = bench.take(PrefillJob)
    assert ".p1." in ask.subject
    assert new.pa == old.pa + 1
    assert (amend.da, amend.pa) == (decode.da + 1, new.pa)
    assert amend.source is not None
    assert amend.source.worker == "p1"
    assert [(w, c.pa) for w, c in bench.published(Cancel)] == [("p0", old.pa)]


def test_with_no_other_prefill_worker_decode_reads_the_prompt_itself():
    bench = Bench()
    decode, prefill = bench.prefilling()
    bench.run(2.1)
    _, amend = bench.take(Amend)
    assert amend.source is None
    assert amend.pa == prefill.pa + 1
    assert amend.da == decode.da + 1


def test_after_three_lost_prefills_decode_reads_the_prompt_itself():
    bench = Bench(prefills=4)
    bench.reserved()
    for _ in range(2):
        bench.unanswered(PrefillJob)
        assert bench.accept(Amend).source is not None
    bench.unanswered(PrefillJob)
    assert bench.accept(Amend).source is None
    assert bench.state() is S.PREFILLING


def test_a_digest_that_shows_the_prefill_queued_or_moving_is_progress():
    bench = Bench()
    _, prefill = bench.prefilling()
    bench.run(1.5)
    bench.digest("p0", DigestRow("a", prefill.pa, "queued", (0,)), role="prefill")
    bench.run(1.5)
    bench.digest("p0", DigestRow("a", prefill.pa, "running", (4,)), role="prefill")
    bench.run(1.5)
    bench.digest("p0", DigestRow("a", prefill.pa, "running", (4,)), role="prefill")
    assert not bench.asked(Amend)
    bench.run(0.6)
    assert len(bench.asked(Amend)) == 1


def test_a_chunk_that_takes_longer_than_our_patience_is_progress_while_beats_show_its_step():
    bench = Bench()
    _, prefill = bench.prefilling()
    for step_age_ms in (1400, 2900, 4400):
        bench.run(1.5)
        bench.receive(worker_beat("p0", "prefill", step_age_ms=step_age_ms))
        bench.digest("p0", DigestRow("a", prefill.pa, "running", (0,)), role="prefill")
    assert not bench.asked(Amend)
    bench.receive(worker_beat("p0", "prefill", step_age_ms=10_001))
    assert len(bench.asked(Amend)) == 1


def test_when_decode_is_lost_during_prefill_another_awaits_the_same_prefill():
    bench = Bench()
    decode, prefill = bench.prefilling()
    bench.receive(worker_beat("d0", "decode", incarnation=2))
    ask, second = bench.take(DecodeJob)
    assert (second.da, second.pa) == (decode.da + 1, prefill.pa)
    assert second.slot != decode.slot
    bench.kv_ready(prefill)
    bench.published(KvReady)
    bench.answer(ask, Accepted())
    assert [m.handle.pa for _, m in bench.published(KvReady)] == [prefill.pa]
    assert bench.state() is S.TRANSFERRING
    assert not bench.asked(PrefillJob)


def test_a_stale_kv_ready_is_released_and_its_token_is_not_taken():
    bench = Bench(prefills=2)
    _, old = bench.prefilling()
    bench.run(2.1)
    bench.kv_ready(old, 666)
    assert bench.tokens() == []
    _, release = bench.take(Release)
    assert release.handle_id == f"h-a-{old.pa}"


# --- transferring ---


def test_kv_ready_is_forwarded_after_300_ms_of_silence():
    bench = Bench()
    bench.transferring()
    bench.run(0.25)
    assert not bench.published(KvReady)
    bench.run(0.1)
    assert [w for w, _ in bench.published(KvReady)] == ["d0"]


def test_kv_ready_is_forwarded_again_at_each_digest_that_says_reserved():
    bench = Bench()
    decode, _ = bench.transferring()
    bench.run(0.4)
    bench.published(KvReady)
    bench.digest("d0", DigestRow("a", decode.da, "reserved", (0,), decode.slot))
    assert [w for w, _ in bench.published(KvReady)] == ["d0"]


def test_kv_loaded_makes_it_decoding_and_nothing_is_forwarded():
    bench = Bench()
    bench.decoding()
    assert bench.state() is S.DECODING
    bench.run(1.0)
    assert not bench.published(KvReady)


def test_a_first_frame_makes_it_decoding_too():
    bench = Bench()
    decode, _ = bench.transferring()
    bench.row(decode.slot, decode.da, 1, 8)
    assert bench.state() is S.DECODING
    assert bench.tokens() == [1000, 8]


def test_kv_failed_prefills_again_and_amends_the_same_decode_worker():
    bench = Bench()
    decode, old = bench.transferring()
    bench.kv_failed(decode)
    _, amend = bench.take(Amend)
    _, new = bench.take(PrefillJob)
    assert (amend.da, amend.pa, new.pa) == (decode.da + 1, old.pa + 1, old.pa + 1)
    assert amend.outputs == ((1000,),)
    assert new.ids[-1] == 1000
    assert bench.state() is S.PREFILLING
    assert bench.take(Release)[1].handle_id == f"h-a-{old.pa}"


def test_when_decode_is_lost_in_transfer_another_gets_the_same_handle():
    bench = Bench()
    decode, prefill = bench.transferring()
    bench.receive(worker_beat("d0", "decode", incarnation=2))
    second = bench.accept(DecodeJob)
    assert (second.da, second.pa, second.outputs) == (decode.da + 1, prefill.pa, ((),))
    assert [m.handle.pa for _, m in bench.published(KvReady)] == [prefill.pa]
    assert bench.state() is S.TRANSFERRING


def test_the_lease_is_renewed_while_transferring_and_no_longer():
    bench = Bench()
    decode, _ = bench.transferring()
    bench.run(3.1)
    assert [(w, m.handle_ids) for w, m in bench.published(Renew)] == [("p0", ("h-a-1",))]
    bench.kv_loaded(decode)
    bench.run(3.1)
    assert not bench.published(Renew)


# --- decoding ---


def test_rows_are_appended_once_and_in_order():
    bench = Bench()
    decode = bench.decoding()
    bench.row(decode.slot, decode.da, 1, 2, 3)
    bench.row(decode.slot, decode.da, 1, 2, 3)
    bench.row(decode.slot, decode.da, 2, 3, 4)
    assert bench.tokens() == [1000, 2, 3, 4]


def test_rows_of_an_attempt_that_was_lost_are_dropped_in_silence():
    bench = Bench()
    decode = bench.decoding()
    bench.row(decode.slot, decode.da, 1, 2)
    bench.receive(Preempted("a", "d0", decode.da))
    bench.row(decode.slot, decode.da, 2, 666)
    assert bench.tokens() == [1000, 2]


def test_a_lost_decode_worker_costs_a_new_prefill_of_prompt_and_outputs():
    bench = Bench()
    decode = bench.decoding()
    bench.row(decode.slot, decode.da, 1, 2, 3)
    bench.receive(worker_beat("d0", "decode", incarnation=2))
    assert bench.state() is S.PREFILLING
    second = bench.accept(DecodeJob)
    prefill = bench.accept(PrefillJob)
    assert second.outputs == ((1000, 2, 3),)
    assert prefill.ids[-3:] == (1000, 2, 3)
    bench.kv_ready(prefill, 4)
    assert bench.tokens() == [1000, 2, 3, 4]


def test_a_preempted_request_asks_that_worker_last():
    bench = Bench()
    decode = bench.decoding()
    bench.receive(Preempted("a", "d0", decode.da))
    ask, _ = bench.take(DecodeJob)
    assert ".d1." in ask.subject


def test_a_finish_row_ends_it_and_the_slot_is_acknowledged_in_a_batch():
    bench = Bench()
    decode = bench.decoding()
    bench.row(decode.slot, decode.da, 1, 2, finish=FinishReason.LENGTH)
    done = bench.done()
    assert done is not None
    assert done.error is None
    assert bench.state() is S.FINISHED
    assert not bench.published(FinAck)
    bench.run(0.25)
    assert [(w, m.slots) for w, m in bench.published(FinAck)] == [("d0", (decode.slot,))]
    assert not bench.published(Cancel)


def test_a_stop_string_cancels_decode():
    bench = Bench()
    decode = bench.decoding()
    bench.stop()
    assert bench.state() is S.FINISHED
    assert [(w, m.da) for w, m in bench.published(Cancel)] == [("d0", decode.da)]


def test_a_first_token_that_ends_it_cancels_decode_and_releases_the_handle():
    bench = Bench()
    decode, prefill = bench.prefilling()
    bench.kv_ready(prefill, finish=FinishReason.STOP)
    assert bench.state() is S.FINISHED
    assert [(w, m.da) for w, m in bench.published(Cancel)] == [("d0", decode.da)]
    assert bench.take(Release)[1].handle_id == "h-a-1"


def test_an_engine_error_fails_the_request():
    bench = Bench()
    decode = bench.decoding()
    bench.row(decode.slot, decode.da, 1, finish=FinishReason.ERROR)
    assert bench.error() == "EngineFailed"


# --- several answers ---


def test_each_of_several_answers_has_its_own_tokens_and_end():
    bench = Bench()
    decode, prefill = bench.prefilling(n=3)
    bench.kv_ready(prefill, 50)
    bench.kv_loaded(decode)
    assert [bench.tokens(choice=c) for c in range(3)] == [[50], [51], [52]]
    bench.row(decode.slot + 1, decode.da, 1, 7, finish=FinishReason.STOP)
    assert bench.done() is None
    bench.row(decode.slot, decode.da, 1, 6, finish=FinishReason.STOP)
    bench.row(decode.slot + 2, decode.da, 1, 8, finish=FinishReason.STOP)
    assert bench.done() is not None
    bench.run(0.25)
    assert [m.slots for _, m in bench.published(FinAck)] == [(decode.slot + 1, decode.slot, decode.slot + 2)]


def test_a_stop_string_in_one_of_several_answers_ends_that_slot_at_once():
    bench = Bench()
    decode, prefill = bench.prefilling(n=2)
    bench.kv_ready(prefill, 50)
    bench.kv_loaded(decode)
    bench.stop(1)
    assert [m.slots for _, m in bench.published(FinAck)] == [(decode.slot + 1,)]
    bench.row(decode.slot + 1, decode.da, 1, 9)
    assert bench.tokens(choice=1) == [51]
    assert bench.done() is None


def test_an_ended_answer_is_forgotten_again_by_the_next_decode_worker():
    bench = Bench()
    decode, prefill = bench.prefilling(n=2)
    bench.kv_ready(prefill, 50)
    bench.kv_loaded(decode)
    bench.row(decode.slot, decode.da, 1, 7, finish=FinishReason.STOP)
    bench.run(0.3)
    bench.published(FinAck)
    bench.receive(Preempted("a", "d0", decode.da))
    second = bench.accept(DecodeJob)
    assert second.outputs == ((50, 7), (51,))
    bench.run(0.3)
    assert [(w, m.slots) for w, m in bench.published(FinAck)] == [("d1", (second.slot,))]


# --- ends ---


def test_what_was_cached_is_final_from_the_first_token_on():
    """KvReady was lost, decode has the KV: nobody said what was cached. What a second reading finds is another matter."""
    bench = Bench()
    decode, _ = bench.prefilling()
    bench.row(decode.slot, decode.da, 0, 5)
    bench.mute.add("d0")
    bench.run(6.0)
    _, again = bench.accept(DecodeJob), bench.accept(PrefillJob)
    bench.kv_ready(again, cached=8)
    assert len(bench.delivered) == 2
    assert {deliver.cached_tokens for deliver in bench.delivered} == {0}


@pytest.mark.parametrize("state", ["queued", "reserved", "prefilling", "transferring", "decoding"])
def test_a_client_that_leaves_ends_the_work_on_both_workers(state: str):
    bench = Bench()
    if state == "queued":
        bench.submit()
    else:
        getattr(bench, state)()
    bench.leave()
    assert bench.state() is S.CANCELLED
    cancelled = {worker for worker, _ in bench.published(Cancel)}
    released = bool(bench.asked(Release))
    assert "d0" in cancelled
    assert ("p0" in cancelled) == (state in ("reserved", "prefilling"))
    assert released == (state == "transferring")
    assert bench.core.held["lives"] == bench.core.held["slots"] == 0


@pytest.mark.parametrize("state", ["prefilling", "decoding"])
def test_what_is_left_because_its_request_failed_has_failed_with_it(state: str):
    """The client of a request of several prompts is still there when another of them fails."""
    bench = Bench()
    getattr(bench, state)()
    bench.leave(error=TooManyRequests("full"))
    assert bench.state() is S.FAILED
    assert bench.records[-1].error == "overloaded"
    assert "d0" in {worker for worker, _ in bench.published(Cancel)}
    assert not any("cancelled" in what for what in bench.core.counts)


def test_the_deadline_ends_it_in_any_state():
    bench = Bench()
    bench.decoding(timeout_s=3.0)
    bench.run(3.1)
    assert bench.error() == "DeadlineExceeded"
    assert bench.state() is S.FAILED


def test_the_ninth_loss_of_an_accepted_decode_worker_spends_the_budget():
    bench = Bench(split="never")
    bench.submit()
    for incarnation in range(2, 11):
        ask, _ = bench.take(DecodeJob)
        bench.answer(ask, Accepted())
        assert bench.done() is None
        bench.receive(worker_beat(ask.subject.split(".")[3], "decode", incarnation=incarnation))
    assert bench.error() == "LossBudgetSpent"


def test_nothing_follows_the_end():
    bench = Bench()
    decode = bench.decoding()
    bench.leave()
    count = len(bench.delivered)
    bench.row(decode.slot, decode.da, 1, 2)
    bench.kv_loaded(decode)
    bench.stop()
    bench.leave()
    assert len(bench.delivered) == count


def test_release_is_tried_three_times():
    bench = Bench()
    bench.transferring()
    bench.leave()
    for _ in range(3):
        bench.unanswered(Release)
    assert not bench.asked(Release)


def test_an_answered_release_is_not_repeated():
    bench = Bench()
    bench.transferring()
    bench.leave()
    ask, _ = bench.take(Release)
    bench.answer(ask, ReleaseAnswer(True))
    assert not bench.asked(Release)


# --- amend ---


def test_an_unanswered_amend_is_tried_three_times_under_its_number_then_decode_is_lost():
    bench = Bench()
    decode, _ = bench.transferring()
    bench.kv_failed(decode)
    numbers = [bench.unanswered(Amend).da for _ in range(3)]
    assert numbers == [decode.da + 1] * 3
    assert bench.take(DecodeJob)[1].da == decode.da + 2


def test_a_refused_amend_is_a_lost_decode_worker():
    bench = Bench()
    decode, _ = bench.transferring()
    bench.kv_failed(decode)
    ask, _ = bench.take(Amend)
    bench.answer(ask, Refused(RefuseReason.UNKNOWN, "not here"))
    assert bench.take(DecodeJob)[1].da == decode.da + 2


def test_rows_of_the_content_before_an_amend_are_dropped():
    bench = Bench()
    decode, _ = bench.transferring()
    bench.kv_failed(decode)
    bench.row(decode.slot, decode.da, 1, 666)
    assert bench.tokens() == [1000]


# --- losses on the way ---


def test_an_index_gap_is_asked_for_by_resume_one_at_a_time():
    bench = Bench()
    decode = bench.decoding()
    bench.row(decode.slot, decode.da, 2, 3)
    bench.row(decode.slot, decode.da, 3, 4)
    ask, resume = bench.take(Resume)
    assert [(r.attempt, r.slot, r.next_index) for r in resume.rows] == [(decode.da, decode.slot, 1)]
    assert not bench.asked(Resume)
    bench.row(decode.slot, decode.da, 1, 2, 3, 4)
    bench.answer(ask, ResumeAnswer(()))
    assert bench.tokens() == [1000, 2, 3, 4]


def test_a_gap_in_the_stream_asks_for_every_request_there():
    bench = Bench()
    decode = bench.decoding()
    bench.row(99, 1, 0, 1, skip=1)
    assert [r.slot for r in bench.take(Resume)[1].rows] == [decode.slot]


def test_a_digest_that_is_ahead_is_asked_for():
    bench = Bench()
    decode = bench.decoding()
    bench.digest("d0", DigestRow("a", decode.da, "running", (5,), decode.slot))
    assert [r.next_index for r in bench.take(Resume)[1].rows] == [1]


def test_a_job_missing_in_the_digest_is_asked_for_and_placed_again_when_unknown():
    bench = Bench()
    decode = bench.decoding()
    bench.digest("d0")
    assert not bench.asked(DecodeJob)
    ask, _ = bench.take(Resume)
    bench.answer(ask, ResumeAnswer((("a", decode.da),)))
    assert bench.take(DecodeJob)[1].da == decode.da + 1


def test_a_digest_row_that_is_not_current_is_cancelled_or_released():
    bench = Bench()
    bench.digest("d0", DigestRow("gone", 3, "running", (5,), 1))
    bench.digest("p0", DigestRow("gone", 2, "running", (5,)), role="prefill")
    bench.digest("p0", DigestRow("gone", 2, "held", (5,), 0, "h", "t"), role="prefill")
    assert [(w, c.pa, c.da) for w, c in bench.published(Cancel)] == [("d0", 0, 3), ("p0", 2, 0)]
    assert bench.take(Release)[1].handle_id == "h"


def test_a_held_prefill_that_we_have_no_kv_ready_of_is_asked_for():
    bench = Bench()
    _, prefill = bench.prefilling()
    bench.digest("p0", DigestRow("a", prefill.pa, "held", (10,), 0, "h", "t"), role="prefill")
    ask, resume = bench.take(Resume)
    assert ".p0." in ask.subject
    assert [(r.rid, r.attempt) for r in resume.rows] == [("a", prefill.pa)]


def test_a_failed_row_in_a_digest_is_the_lost_kv_failed():
    bench = Bench()
    decode, _ = bench.transferring()
    bench.digest("d0", DigestRow("a", decode.da, "failed", (0,), decode.slot))
    assert bench.take(Amend)[1].da == decode.da + 1


def test_a_running_row_in_a_digest_is_the_lost_kv_loaded():
    bench = Bench()
    decode, _ = bench.transferring()
    bench.digest("d0", DigestRow("a", decode.da, "running", (1,), decode.slot))
    assert bench.state() is S.DECODING


def test_a_worker_whose_kv_cannot_be_reached_is_left_alone_for_a_while():
    bench = Bench(prefills=2)
    decode, _ = bench.transferring()
    bench.kv_failed(decode, reason=FailReason.UNREACHABLE)
    ask, _ = bench.take(PrefillJob)
    assert ".p1." in ask.subject


def test_switched_off_the_attempt_guard_lets_a_lost_workers_row_in():
    bench = Bench(rules=Rules(guard_da=False))
    decode, _ = bench.transferring()
    bench.kv_failed(decode)
    bench.row(decode.slot, decode.da, 1, 666)
    assert bench.tokens() == [1000, 666]


def test_no_responders_while_nobody_is_sick_means_dead_now():
    bench = Bench()
    bench.submit()
    bench.unanswered(DecodeJob, NoAnswer.NO_RESPONDERS)
    dead = [w.beat.name for w in bench.core.fleet if not w.alive]
    assert dead == ["d0"]
    assert ".d1." in bench.take(DecodeJob)[0].subject
