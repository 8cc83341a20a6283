"""The prefill worker's core, message by message; each also lost, doubled, late or for another life."""

from __future__ import annotations

import pytest

from splitserve.engine import door
from splitserve.prefill.jobs import PrefillJobs
from splitserve.protocol.effects import Answer, BusDown, Drain, Received, Tick
from splitserve.protocol.handle import GroupBlocks
from splitserve.protocol.messages import (
    Beat,
    Cancel,
    Digest,
    DigestRow,
    KvReady,
    Ping,
    Pong,
    Release,
    ReleaseAnswer,
    Renew,
    RenewAnswer,
    Resume,
    ResumeAnswer,
    ResumeRow,
)
from splitserve.protocol.states import FinishReason, PrefillState, RefuseReason, Role
from splitserve.worker.rules import Limits, Rules
from support.worker_cores import (
    PROMPT,
    R1,
    SUBJECTS,
    Driver,
    accepted,
    identity,
    prefill_job,
    prefilled,
    refused,
)


def prefill(*, blocks: int = 100, limits: Limits | None = None, rules: Rules | None = None) -> Driver:
    core = PrefillJobs(
        identity(blocks=blocks), SUBJECTS, limits or Limits(), rules or Rules(), new_token=lambda: "t" * 32
    )
    return Driver(core)


def held(driver: Driver, rid: str = "a", pa: int = 1) -> KvReady:
    accepted(driver.say(prefill_job(rid, pa)))
    driver.engine(prefilled(rid, pa))
    return driver.published(KvReady, R1)[0]


def cancel(rid: str = "a", pa: int = 1, incarnation: int = 7) -> Cancel:
    return Cancel(rid, incarnation, pa, 0, "test")


def test_a_job_is_accepted_once_and_its_double_gets_the_same_answer_without_work() -> None:
    driver = prefill()
    first = accepted(driver.say(prefill_job()))
    (add,) = driver.to_engine(door.Add)
    assert (add.key, add.mode, add.ids, add.outputs) == (("a", 1), door.Mode.PREFILL, PROMPT, ((),))
    driver.engine(door.Progress(("a", 1), 4))
    assert driver.say(prefill_job()) == first
    assert driver.to_engine(door.Add) == []


def test_delivered_tokens_of_a_single_sequence_are_read_with_the_prompt() -> None:
    driver = prefill()
    driver.say(prefill_job(ids=(*PROMPT, 50, 51)))
    assert driver.to_engine(door.Add)[0].outputs == ((50, 51),)


def test_kv_ready_goes_to_all_subjects_in_one_step_and_names_the_held_blocks() -> None:
    driver = prefill()
    ready = held(driver)
    assert driver.published(KvReady, SUBJECTS.worker_kv("d")) == [ready]
    assert ready.final
    assert ready.finishes == (FinishReason.RUNNING,)
    assert (ready.handle.rid, ready.handle.pa, ready.handle.owner, ready.handle.incarnation) == ("a", 1, "w", 7)
    assert ready.handle.ttl_s == Limits().lease_ttl_s
    assert ready.handle.groups[0].blocks == (0, 1, 2)


def test_a_release_frees_the_blocks_and_its_double_says_unknown() -> None:
    driver = prefill()
    handle = held(driver).handle
    assert driver.say(Release(handle.id, handle.token)) == ReleaseAnswer(True)
    assert driver.to_engine(door.Release) == [door.Release(("a", 1))]
    assert driver.say(Release(handle.id, handle.token)) == ReleaseAnswer(False)
    assert driver.to_engine(door.Release) == []
    assert driver.core.idle


def test_a_release_with_another_token_frees_nothing() -> None:
    driver = prefill()
    handle = held(driver).handle
    assert driver.say(Release(handle.id, "x" * 32)) == ReleaseAnswer(False)
    assert driver.to_engine(door.Release) == []


def test_a_lost_release_costs_no_more_than_the_lease() -> None:
    driver = prefill()
    held(driver)
    driver.after(14.9)
    assert driver.to_engine(door.Release) == []
    driver.after(0.2)
    assert driver.to_engine(door.Release) == [door.Release(("a", 1))]
    assert driver.core.idle


def test_renewal_moves_the_end_of_a_lease_and_names_unknown_handles() -> None:
    driver = prefill()
    handle = held(driver).handle
    driver.after(10)
    assert driver.say(Renew((handle.id, "gone"))) == RenewAnswer(("gone",))
    driver.after(14)
    assert driver.to_engine(door.Release) == []
    driver.after(1.1)
    assert driver.to_engine(door.Release) == [door.Release(("a", 1))]


def test_a_waking_worker_ends_its_leases_before_it_hears_of_a_renewal() -> None:
    driver = prefill()
    handle = held(driver).handle
    driver.now += 60
    assert driver.say(Renew((handle.id,))) == RenewAnswer((handle.id,))
    assert driver.to_engine(door.Release) == [door.Release(("a", 1))]


def test_a_pinned_block_is_freed_only_when_its_sender_has_let_go() -> None:
    driver = prefill()
    assert isinstance(driver.core, PrefillJobs)
    handle = held(driver).handle
    severed: list[bool] = []
    pin = driver.core.leases.pin(handle.id, lambda: severed.append(True))
    driver.after(20)
    assert severed == [True]
    assert driver.to_engine(door.Release) == []
    assert not driver.core.idle
    assert driver.say(Resume("r1", 7, (ResumeRow("a", 1, 0, 0),))) is not None
    assert driver.published(KvReady) == []
    driver.core.leases.unpin(pin)
    driver.event(Tick())
    assert driver.to_engine(door.Release) == [door.Release(("a", 1))]
    assert driver.core.idle


@pytest.mark.parametrize("state", [PrefillState.QUEUED, PrefillState.RUNNING])
def test_a_cancel_ends_a_job_that_waits_or_runs(state: PrefillState) -> None:
    driver = prefill()
    driver.say(prefill_job())
    if state is PrefillState.RUNNING:
        driver.engine(door.Progress(("a", 1), 4))
    driver.say(cancel())
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert driver.core.idle


def test_a_cancel_ends_a_held_job_and_its_lease() -> None:
    driver = prefill()
    held(driver)
    driver.say(cancel())
    assert driver.to_engine(door.Release) == [door.Release(("a", 1))]
    assert driver.core.idle


def test_a_cancel_of_lower_attempts_leaves_the_current_one() -> None:
    driver = prefill()
    driver.say(prefill_job(pa=2))
    driver.say(cancel(pa=1))
    assert driver.commands == []
    assert not driver.core.idle


def test_a_cancel_that_comes_before_its_job_stops_it() -> None:
    driver = prefill()
    driver.say(cancel(pa=3))
    assert refused(driver.say(prefill_job(pa=3))).reason is RefuseReason.STALE_ATTEMPT
    accepted(driver.say(prefill_job(pa=4)))


def test_a_late_double_of_an_ended_job_does_not_run_again() -> None:
    driver = prefill()
    handle = held(driver).handle
    driver.say(Release(handle.id, handle.token))
    assert refused(driver.say(prefill_job())).reason is RefuseReason.STALE_ATTEMPT
    assert driver.to_engine(door.Add) == []


def test_without_tombstones_the_double_would_run_again() -> None:
    driver = prefill(rules=Rules(tombstones=False))
    driver.say(prefill_job())
    driver.say(cancel())
    accepted(driver.say(prefill_job()))


def test_a_higher_attempt_replaces_a_lower_one_and_a_lower_one_is_refused() -> None:
    driver = prefill()
    driver.say(prefill_job(pa=1))
    accepted(driver.say(prefill_job(pa=2)))
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert refused(driver.say(prefill_job(pa=1))).reason is RefuseReason.STALE_ATTEMPT
    driver.engine(prefilled("a", 1))
    assert driver.published(KvReady) == []
    driver.engine(prefilled("a", 2))
    assert len(driver.published(KvReady)) == 2


def test_a_message_for_another_life_is_refused_by_name_and_does_nothing() -> None:
    driver = prefill()
    answer = refused(driver.say(prefill_job(incarnation=6)))
    assert answer.reason is RefuseReason.STALE_INCARNATION
    assert "w lives as incarnation 7" in answer.message
    accepted(driver.say(prefill_job()))
    driver.say(cancel(incarnation=6))
    assert driver.commands == []
    assert refused(driver.say(Resume("r1", 6, ()))).reason is RefuseReason.STALE_INCARNATION
    assert driver.say(Ping(6)) == Pong(7)


def test_another_fingerprint_is_refused_with_the_factor_that_differs() -> None:
    driver = prefill()
    driver.say(Beat("d", Role.DECODE, 1, fingerprint="f2", fingerprint_factors=(("protocol", "1"), ("dtype", "bf16"))))
    answer = refused(driver.say(prefill_job(fingerprint="f2")))
    assert answer.reason is RefuseReason.MISMATCH
    assert answer.message == "dtype: here 'float32', there 'bf16'"
    assert "f3" in refused(driver.say(prefill_job("b", fingerprint="f3"))).message


def test_a_prompt_over_the_models_length_is_refused_with_both_numbers() -> None:
    answer = refused(prefill().say(prefill_job(ids=tuple(range(300)))))
    assert answer.reason is RefuseReason.TOO_LONG
    assert "300" in answer.message
    assert "256" in answer.message


def test_held_and_promised_blocks_together_bound_admission() -> None:
    driver = prefill(blocks=6)
    handle = held(driver).handle
    accepted(driver.say(prefill_job("b")))
    full = refused(driver.say(prefill_job("c")))
    assert full.reason is RefuseReason.FULL
    assert full.retry_ms >= 150
    driver.say(Release(handle.id, handle.token))
    assert driver.say(prefill_job("c")) == full  # a refusal is repeated to its double
    accepted(driver.say(prefill_job("c", 2)))


def test_a_prompt_over_the_pool_is_refused_for_good() -> None:
    assert refused(prefill(blocks=2).say(prefill_job())).reason is RefuseReason.TOO_LONG


def test_queued_tokens_bound_admission_but_never_refuse_into_an_empty_queue() -> None:
    driver = prefill(limits=Limits(queued_tokens=15))
    assert accepted(driver.say(prefill_job("a", ids=tuple(range(20))))).queue_tokens == 0
    assert refused(driver.say(prefill_job("b"))).reason is RefuseReason.FULL
    driver.engine(door.Progress(("a", 1), 16))
    assert accepted(driver.say(prefill_job("b", 2))).queue_tokens == 4


def test_resume_sends_kv_ready_again_and_names_what_is_not_here() -> None:
    driver = prefill()
    ready = held(driver)
    driver.say(prefill_job("b"))
    rows = (ResumeRow("a", 1, 0, 0), ResumeRow("b", 1, 0, 0), ResumeRow("a", 2, 0, 0), ResumeRow("c", 1, 0, 0))
    assert driver.say(Resume("r1", 7, rows)) == ResumeAnswer((("a", 2), ("c", 1)))
    assert driver.published(KvReady) == [ready, ready]


def test_the_digest_lists_all_that_is_held_for_a_router_each_second_also_when_nothing_is() -> None:
    driver = prefill()
    ready = held(driver, "a")
    driver.say(prefill_job("b"))
    driver.say(prefill_job("c", router="r2"))
    driver.after(1.0)
    (digest,) = driver.published(Digest, R1)
    assert digest.rows == (
        DigestRow("a", 1, "held", (10,), 0, ready.handle.id, ready.handle.token),
        DigestRow("b", 1, "queued", (0,)),
    )
    driver.say(Release(ready.handle.id, ready.handle.token))
    driver.say(cancel("b"))
    driver.after(1.0)
    assert [digest.rows for digest in driver.published(Digest, R1)] == [()]


def test_a_job_that_the_engine_lost_is_missing_in_a_digest_at_once_and_leaves_a_tombstone() -> None:
    driver = prefill()
    driver.say(prefill_job())
    driver.engine(door.Failed(("a", 1), "it raised"))
    assert [digest.rows for digest in driver.published(Digest, R1)] == [()]
    assert refused(driver.say(prefill_job())).reason is RefuseReason.STALE_ATTEMPT


def test_a_jobs_own_time_ends_it_whatever_its_state() -> None:
    driver = prefill(limits=Limits(lease_ttl_s=1000))
    driver.say(prefill_job("a", ttl_s=5.0))
    driver.say(prefill_job("b", ttl_s=5.0))
    driver.engine(prefilled("b"))
    assert driver.core.wake_at() is not None
    driver.after(5.0)
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert driver.to_engine(door.Release) == [door.Release(("b", 1))]


def test_the_work_of_a_router_that_fell_silent_ends() -> None:
    driver = prefill()
    driver.say(prefill_job("a"))
    driver.say(prefill_job("b", router="r2"))
    driver.beats(6, "r2")
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]


def test_no_router_is_judged_silent_by_a_worker_that_does_not_hear_itself() -> None:
    driver = prefill()
    driver.say(prefill_job("a"))
    driver.beats(3, "r1")
    driver.event(BusDown())
    driver.beats(10, own=False)
    assert driver.to_engine(door.Abort) == []
    driver.beats(1.5)
    assert driver.to_engine(door.Abort) == []  # back, but for less than two seconds
    driver.beats(6, "r1")
    assert driver.to_engine(door.Abort) == []
    driver.beats(6)
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]


def test_a_waking_worker_judges_nobody() -> None:
    driver = prefill()
    driver.say(prefill_job("a"))
    driver.beats(3, "r1")
    driver.after(60)
    assert driver.to_engine(door.Abort) == []


def test_a_draining_worker_takes_nothing_new_and_is_idle_when_its_handles_are_fetched() -> None:
    driver = prefill()
    handle = held(driver).handle
    driver.event(Drain())
    assert refused(driver.say(prefill_job("b"))).reason is RefuseReason.DRAINING
    assert driver.core.beat(driver.now).draining
    assert not driver.core.idle
    driver.say(Release(handle.id, handle.token))
    assert driver.core.idle


def test_time_alone_leaves_no_timer_and_no_tombstone_behind() -> None:
    driver = prefill()
    driver.say(prefill_job())
    driver.say(cancel())
    driver.beats(8)
    assert driver.core.wake_at() is not None
    for _ in range(100):
        driver.after(10)
    assert driver.core.wake_at() is None


def test_wake_at_is_never_in_the_past_after_a_tick() -> None:
    driver = prefill()
    held(driver)
    driver.say(prefill_job("b"))
    for step in range(400):
        driver.after(0.37)
        if step % 50 == 0:
            driver.beats(3)
        at = driver.core.wake_at()
        assert at is None or at > driver.now


def test_the_beat_tells_load_in_blocks_and_tokens() -> None:
    driver = prefill()
    held(driver, "a")
    driver.say(prefill_job("b"))
    driver.engine(door.Progress(("b", 1), 4))
    beat = driver.core.beat(driver.now, step_age_ms=12, bus_lag_ms=3)
    assert (beat.role, beat.promised_blocks, beat.queued_tokens, beat.running) == ("prefill", 6, 6, 1)
    assert (beat.step_age_ms, beat.bus_lag_ms) == (12, 3)


def test_an_answer_is_given_only_where_somebody_waits() -> None:
    driver = prefill()
    driver.event(Received(prefill_job(), None))
    assert driver.of(Answer) == []
    assert len(driver.to_engine(door.Add)) == 1


# --- blocks that are readable before the prompt is done ---


def progress(tokens: int, *blocks: int, rid: str = "a", pa: int = 1) -> door.Progress:
    groups = (GroupBlocks(0, blocks, tuple(100 + block for block in blocks)),) if blocks else ()
    return door.Progress((rid, pa), tokens, groups, f"c{tokens}" if blocks else "")


def test_full_blocks_are_told_to_decode_alone_and_the_final_message_names_all_under_the_same_handle() -> None:
    driver = prefill()
    driver.say(prefill_job())
    driver.engine(progress(5, 0))
    (first,) = driver.published(KvReady)
    assert driver.published(KvReady, R1) == []
    assert (first.final, first.tokens_ready, first.handle.kv_tokens, first.first_ids) == (False, 4, 4, ())
    driver.engine(progress(9, 1))
    (second,) = driver.published(KvReady)
    assert (second.tokens_ready, second.handle.groups[0].blocks, second.handle.chain_hash) == (8, (1,), "c9")
    driver.engine(progress(10), prefilled())
    final = driver.published(KvReady, R1)[0]
    assert final.final
    assert first.handle.id == second.handle.id == final.handle.id
    assert final.handle.groups[0].blocks == (0, 1, 2)


def test_a_prompt_of_one_chunk_is_told_once() -> None:
    driver = prefill()
    driver.say(prefill_job())
    driver.engine(progress(10), prefilled())
    assert [ready.final for ready in driver.published(KvReady)] == [True, True]


def test_the_lease_of_a_prompt_that_is_computed_holds_what_was_told_and_has_no_end_by_time() -> None:
    driver = prefill()
    assert isinstance(driver.core, PrefillJobs)
    driver.say(prefill_job())
    driver.engine(progress(4, 0))
    driver.engine(progress(9, 1))
    handle = driver.published(KvReady)[0].handle
    lease = driver.core.leases.lookup(handle.id, handle.token)
    assert lease is not None
    assert lease.groups == (GroupBlocks(0, (0, 1), (100, 101)),)
    assert driver.core.promised_blocks == 3
    driver.after(100)
    assert driver.to_engine(door.Release) == []
    driver.engine(prefilled())
    assert driver.core.promised_blocks == 3
    driver.after(15.1)
    assert driver.to_engine(door.Release) == [door.Release(("a", 1))]


def test_a_cancel_of_a_prompt_that_is_read_early_frees_it_behind_its_sender() -> None:
    driver = prefill()
    assert isinstance(driver.core, PrefillJobs)
    driver.say(prefill_job())
    driver.engine(progress(4, 0))
    severed: list[bool] = []
    pin = driver.core.leases.pin(driver.published(KvReady)[0].handle.id, lambda: severed.append(True))
    driver.say(cancel())
    assert severed == [True]
    assert driver.to_engine(door.Release) == []
    driver.core.leases.unpin(pin)
    driver.event(Tick())
    assert driver.to_engine(door.Release) == [door.Release(("a", 1))]
    assert driver.core.idle


def test_a_job_that_the_engine_lost_ends_the_lease_of_what_was_told() -> None:
    driver = prefill()
    driver.say(prefill_job())
    driver.engine(progress(4, 0))
    driver.engine(door.Failed(("a", 1), "it raised"))
    assert driver.core.idle
    assert driver.core.promised_blocks == 0


def test_a_prompt_that_starts_anew_names_its_new_blocks() -> None:
    driver = prefill()
    assert isinstance(driver.core, PrefillJobs)
    driver.say(prefill_job())
    driver.engine(progress(9, 0, 1))
    driver.engine(progress(4, 7))
    handle = driver.published(KvReady)[0].handle
    lease = driver.core.leases.lookup(handle.id, handle.token)
    assert lease is not None
    assert lease.groups[0].blocks == (7,)
