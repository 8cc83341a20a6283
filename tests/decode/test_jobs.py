"""The decode worker's core, message by message; each also lost, doubled, late or for another life."""

from __future__ import annotations

from typing import Any

import pytest

from splitserve.decode.effects import AbandonFetch, Attach, Fetch, Fetched, FetchFailed
from splitserve.decode.jobs import DecodeJobs
from splitserve.engine import door
from splitserve.protocol.effects import Ask, Drain, NoAnswer, Publish, Unanswered
from splitserve.protocol.handle import GroupBlocks
from splitserve.protocol.messages import (
    Cancel,
    DecodeDurations,
    Digest,
    DigestRow,
    FinAck,
    FirstRow,
    KvFailed,
    KvLoaded,
    KvReady,
    Message,
    Ping,
    Pong,
    Preempted,
    Release,
    Renew,
    RenewAnswer,
    Resume,
    ResumeAnswer,
    ResumeRow,
    TokenFrame,
    TokenRow,
)
from splitserve.protocol.params import SamplingParams, TokenLogprob
from splitserve.protocol.states import FailReason, FinishReason, RefuseReason
from splitserve.worker.rules import Limits, Rules
from support.worker_cores import (
    PROMPT,
    R1,
    R2,
    SUBJECTS,
    Driver,
    accepted,
    amend,
    decode_job,
    handle,
    identity,
    kv_ready,
    refused,
    reserved,
    source,
    token,
)

STOP, LENGTH, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR


def decode(*, blocks: int = 100, limits: Limits | None = None, rules: Rules | None = None) -> Driver:
    return Driver(DecodeJobs(identity(blocks=blocks), SUBJECTS, limits or Limits(), rules or Rules()))


def fetched(rid: str = "a", da: int = 1) -> Fetched:
    return Fetched((rid, da), 300, 3, "shm", 0.02)


def fetching(driver: Driver, rid: str = "a", slot: int = 0) -> Fetch:
    accepted(driver.say(decode_job(rid, slot=slot)))
    driver.engine(reserved(rid))
    driver.say(kv_ready(rid))
    return driver.of(Fetch)[0]


def running(driver: Driver, rid: str = "a", slot: int = 0) -> None:
    """Fetched, and one token of its own behind the first one (77)."""
    fetching(driver, rid, slot)
    driver.event(fetched(rid))
    driver.engine(token(rid, 1, 1, (5,)))


def cancel(rid: str = "a", da: int = 1, incarnation: int = 7) -> Cancel:
    return Cancel(rid, incarnation, 0, da, "test")


# --- jobs ---


def test_a_reservation_is_made_once_and_its_double_gets_the_same_answer() -> None:
    driver = decode()
    first = accepted(driver.say(decode_job()))
    (add,) = driver.to_engine(door.Add)
    assert (add.key, add.mode, add.ids) == (("a", 1), door.Mode.AWAIT, PROMPT)
    assert driver.of(Attach) == [Attach(source())]
    assert first.reserved_blocks == 5  # ceil((10 + 8) / 4)
    assert driver.say(decode_job()) == first
    assert driver.to_engine(door.Add) == []


def test_a_local_job_computes_its_prompt_here() -> None:
    driver = decode()
    accepted(driver.say(decode_job(source=None, outputs=((50, 51),))))
    (add,) = driver.to_engine(door.Add)
    assert (add.mode, add.ids, add.outputs) == (door.Mode.LOCAL, PROMPT, ((50, 51),))
    assert driver.of(Attach) == []
    assert driver.core.queued_tokens == 10
    driver.engine(token("a", 1, 2, (52,)))
    assert [row.first_index for row in driver.rows()] == [2]
    assert driver.core.queued_tokens == 0


def test_promises_are_of_at_most_256_tokens_and_fill_at_most_95_percent_of_the_pool() -> None:
    driver = decode(blocks=100)
    need = accepted(driver.say(decode_job("a", params=SamplingParams(max_tokens=100_000)))).reserved_blocks
    assert need == 67  # ceil((10 + 256) / 4)
    full = refused(driver.say(decode_job("b", slot=1, params=SamplingParams(max_tokens=120))))
    assert full.reason is RefuseReason.FULL  # 67 + 33 > 95
    assert full.retry_ms >= 150
    accepted(driver.say(decode_job("b", da=2, slot=1, params=SamplingParams(max_tokens=100))))
    assert driver.core.promised_blocks == 67 + 28


def test_n_sequences_share_the_full_blocks_of_their_prompt() -> None:
    driver = decode()
    job = decode_job(seeds=(1, 2, 3), outputs=((), (), ()), params=SamplingParams(max_tokens=6))
    assert accepted(driver.say(job)).reserved_blocks == 2 + 3 * 2


def test_what_can_never_fit_is_refused_for_good() -> None:
    answer = refused(decode(blocks=10).say(decode_job(params=SamplingParams(max_tokens=200))))
    assert answer.reason is RefuseReason.TOO_LONG


def test_a_late_double_of_an_ended_job_does_not_run_again() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.say(cancel())
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert refused(driver.say(decode_job())).reason is RefuseReason.STALE_ATTEMPT


def test_a_higher_attempt_replaces_a_lower_one_and_a_lower_one_is_refused() -> None:
    driver = decode()
    driver.say(decode_job(da=1))
    accepted(driver.say(decode_job(da=2, slot=4)))
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert refused(driver.say(decode_job(da=1))).reason is RefuseReason.STALE_ATTEMPT
    driver.engine(token("a", 1, 0, (9,)))
    assert driver.rows() == []


def test_a_message_for_another_life_is_refused_by_name_and_does_nothing() -> None:
    driver = decode()
    assert refused(driver.say(decode_job(incarnation=6))).reason is RefuseReason.STALE_INCARNATION
    running(driver)
    assert refused(driver.say(amend(incarnation=6))).reason is RefuseReason.STALE_INCARNATION
    assert refused(driver.say(Resume("r1", 6, ()))).reason is RefuseReason.STALE_INCARNATION
    for message in (cancel(incarnation=6), FinAck("r1", 6, (0,))):
        driver.say(message)
        assert driver.commands == []
    assert driver.say(Ping(7)) == Pong(7)


def test_another_fingerprint_is_refused() -> None:
    assert refused(decode().say(decode_job(fingerprint="f2"))).reason is RefuseReason.MISMATCH


# --- the hand-over ---


def test_the_fetch_begins_only_when_handle_and_blocks_are_both_here() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.say(kv_ready())
    assert driver.of(Fetch) == []
    driver.now += 0.5
    driver.engine(reserved(cached=1))
    (fetch,) = driver.of(Fetch)
    assert [(pair.remote, pair.generation, pair.local) for pair in fetch.pairs] == [(51, 901, 11), (52, 902, 12)]
    driver.event(fetched())
    (loaded,) = driver.published(KvLoaded, R1)
    assert (loaded.cached_tokens, loaded.bytes, loaded.handle_s, loaded.transfer_s) == (4, 300, 0.5, 0.02)


def test_a_fetched_job_is_loaded_and_its_handle_released_with_three_tries() -> None:
    driver = decode()
    fetching(driver)
    driver.event(fetched())
    assert driver.to_engine(door.Loaded) == [door.Loaded(("a", 1), 0, (77,))]
    for left in (2, 1, 0):
        (ask,) = driver.of(Ask)
        assert ask.subject == SUBJECTS.worker_lease("p")
        assert ask.message == Release("h-a-1", "0" * 32)
        assert (ask.timeout_s, ask.tag.tries_left) == (0.3, left)
        driver.event(Unanswered(ask.tag, NoAnswer.TIMEOUT))
    assert driver.commands == []


def test_a_double_kv_ready_fetches_once() -> None:
    driver = decode()
    fetching(driver)
    driver.say(kv_ready())
    assert driver.commands == []
    driver.event(fetched())
    driver.say(kv_ready())
    assert driver.commands == []


@pytest.mark.parametrize(
    "changes",
    [{"handle": handle(pa=2)}, {"handle": handle(owner="p2")}, {"handle": handle(incarnation=4)}, {"final": False}],
    ids=["attempt", "owner", "life", "not final"],
)
def test_only_the_awaited_kv_is_taken(changes: dict[str, Any]) -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(kv_ready(**changes))
    assert driver.commands == []


def test_a_local_job_takes_no_kv() -> None:
    driver = decode()
    driver.say(decode_job(source=None))
    driver.say(kv_ready())
    assert driver.commands == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"handle": handle(chain_hash="00" * 16)}, "chain hash"),
        ({"handle": handle(fingerprint="f2")}, "fingerprint"),
        ({"handle": handle(kv_tokens=9)}, "tokens"),
        ({"handle": handle(groups=())}, "blocks by group"),
        ({"index": 1}, "index"),
        ({"first_ids": (1, 2)}, "first tokens"),
    ],
)
def test_a_handle_of_other_tokens_or_another_model_fails_naming_the_difference(
    changes: dict[str, Any], named: str
) -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(kv_ready(**changes))
    (failed,) = driver.published(KvFailed, R1)
    assert failed.reason is FailReason.MISMATCH
    assert named in failed.message
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]


def test_a_failed_fetch_frees_the_blocks_keeps_the_promise_and_is_told() -> None:
    driver = decode()
    fetching(driver)
    promised = driver.core.promised_blocks
    driver.event(FetchFailed(("a", 1), FailReason.FENCED, "a generation moved"))
    assert [f.reason for f in driver.published(KvFailed, R1)] == [FailReason.FENCED]
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert driver.to_engine(door.Loaded) == []
    assert driver.of(Ask) == []
    assert driver.core.promised_blocks == promised
    driver.say(kv_ready())  # forwarded again: this attempt has had its chance
    assert driver.commands == []
    accepted(driver.say(amend(source=source("p2"))))


def test_leases_are_renewed_while_fetching_one_message_an_owner_until_one_is_unknown() -> None:
    driver = decode()
    fetching(driver, "a", 0)
    fetching(driver, "b", 1)
    driver.after(3)
    renewals = [command for command in driver.of(Publish) if isinstance(command.message, Renew)]
    assert renewals == [Publish(SUBJECTS.worker_lease("p"), Renew(("h-a-1", "h-b-1")), reply=True)]
    driver.say(RenewAnswer(("h-a-1",)))
    driver.after(3)
    assert driver.published(Renew) == [Renew(("h-b-1",))]
    driver.event(fetched("b"))
    driver.after(3)
    assert driver.published(Renew) == []


def test_a_cancel_during_a_fetch_frees_the_blocks_only_behind_the_copy() -> None:
    driver = decode()
    fetching(driver)
    driver.say(cancel())
    assert driver.commands == [AbandonFetch(("a", 1))]
    assert driver.core.promised_blocks == 3
    assert not driver.core.idle
    driver.event(FetchFailed(("a", 1), FailReason.UNREACHABLE, "abandoned"))
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert driver.published(KvFailed) == []
    assert driver.core.idle


def test_a_copy_that_ends_well_after_its_cancel_is_not_used() -> None:
    driver = decode()
    fetching(driver)
    driver.say(cancel())
    driver.event(fetched())
    assert driver.to_engine(door.Loaded) == []
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert driver.of(Ask) == []  # another decode worker may want the handle


def test_a_first_token_that_ends_the_answer_needs_no_fetch() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.say(kv_ready(finishes=(int(STOP),)))
    assert driver.of(Fetch) == []
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert [ask.message for ask in driver.of(Ask)] == [Release("h-a-1", "0" * 32)]
    assert driver.core.promised_blocks == 0
    driver.say(Resume("r1", 7, (ResumeRow("a", 1, 0, 0),)))
    assert driver.rows() == [TokenRow(0, 1, 0, (77,), STOP)]


def test_one_of_several_first_tokens_that_ends_its_answer_leaves_the_rest() -> None:
    driver = decode()
    driver.say(decode_job(seeds=(1, 2), outputs=((), ())))
    driver.engine(reserved())
    driver.say(kv_ready(first_ids=(70, 71), finishes=(int(STOP), 0)))
    driver.event(fetched())
    assert driver.to_engine(door.Loaded) == [door.Loaded(("a", 1), 0, (70, 71))]
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1), 0)]
    driver.engine(token("a", 1, 1, (5,), sequence=1))
    assert [(row.slot, row.ids) for row in driver.rows()] == [(1, (5,))]


def test_sequences_that_had_their_first_token_do_not_take_another() -> None:
    driver = decode()
    driver.say(decode_job(seeds=(1, 2), outputs=((60, 61), (62,))))
    driver.engine(reserved())
    driver.say(kv_ready(first_ids=(70, 71), finishes=(0, 0), index=0))
    driver.event(fetched())
    assert driver.to_engine(door.Loaded) == [door.Loaded(("a", 1), 0, ())]


# --- tokens ---


def test_a_step_gives_one_frame_a_router_numbered_by_router() -> None:
    driver = decode()
    driver.say(decode_job("a", slot=0, source=None))
    driver.say(decode_job("b", slot=1, source=None))
    driver.say(decode_job("c", slot=0, source=None, router="r2"))
    for step in range(2):
        driver.engine(*(token(rid, 1, step, (step,)) for rid in "abc"))
        (mine,) = driver.published(TokenFrame, R1)
        (theirs,) = driver.published(TokenFrame, R2)
        assert (mine.stream_seq, mine.slots, mine.first_indices) == (step + 1, (0, 1), (step, step))
        assert (theirs.stream_seq, theirs.slots) == (step + 1, (0,))


def test_an_attempts_first_row_carries_its_durations_and_comes_again_with_a_resume_from_there() -> None:
    driver = decode()
    driver.say(decode_job(source=None))
    first = door.TokenEvent(("a", 1), 0, 0, (5,), FinishReason.RUNNING, (), 4, 0.1, 0.2, 0.3)
    driver.engine(first, token("a", 1, 1, (6,)))
    assert [row.first for row in driver.rows()] == [FirstRow(0, 4, DecodeDurations(0.1, 0.2, 0.3)), None]
    driver.say(Resume("r1", 7, (ResumeRow("a", 1, 0, 0),)))
    assert driver.rows()[0].first == FirstRow(0, 4, DecodeDurations(0.1, 0.2, 0.3))
    driver.say(Resume("r1", 7, (ResumeRow("a", 1, 0, 1),)))
    assert driver.rows() == [TokenRow(0, 1, 1, (6,))]


def test_resume_is_served_from_the_output_list_first_tokens_and_logprobs_included() -> None:
    driver = decode()
    driver.say(decode_job(ids=PROMPT, outputs=((50,),)))
    ids = (*PROMPT, 50)
    driver.engine(reserved())
    logprobs = tuple(TokenLogprob(-float(n), 1) for n in range(3))
    driver.say(kv_ready(ids=ids, logprobs=logprobs[:1]))
    driver.event(fetched())
    driver.engine(
        door.TokenEvent(("a", 1), 0, 2, (5,), FinishReason.RUNNING, logprobs[1:2]),
        door.TokenEvent(("a", 1), 0, 3, (6,), STOP, logprobs[2:]),
        door.Gone(("a", 1)),
    )
    answer = driver.say(Resume("r1", 7, (ResumeRow("a", 1, 0, 1), ResumeRow("a", 2, 0, 0), ResumeRow("x", 1, 9, 0))))
    assert answer == ResumeAnswer((("a", 2), ("x", 1)))
    assert driver.rows() == [TokenRow(0, 1, 1, (77, 5, 6), STOP, None, logprobs)]
    driver.say(Resume("r1", 7, (ResumeRow("a", 1, 0, 4),)))
    assert driver.rows() == [TokenRow(0, 1, 4, (), STOP)]


def test_a_resume_of_a_sequence_that_is_up_to_date_sends_nothing() -> None:
    driver = decode()
    running(driver)
    assert driver.say(Resume("r1", 7, (ResumeRow("a", 1, 0, 2),))) == ResumeAnswer(())
    assert driver.rows() == []


def test_a_finished_sequence_is_kept_until_fin_ack_which_leaves_a_tombstone() -> None:
    driver = decode()
    running(driver)
    driver.engine(token("a", 1, 2, (6,), LENGTH), door.Gone(("a", 1)))
    driver.after(1)
    (digest,) = driver.published(Digest, R1)
    assert digest.rows == (DigestRow("a", 1, "done", (3,)),)
    assert digest.stream_seq == 2
    driver.say(FinAck("r1", 7, (0, 99)))
    assert driver.to_engine(door.Abort) == []
    assert driver.core.idle
    assert refused(driver.say(decode_job())).reason is RefuseReason.STALE_ATTEMPT


def test_without_fin_ack_a_finished_sequence_is_kept_for_30_seconds() -> None:
    driver = decode()
    running(driver)
    driver.engine(token("a", 1, 2, (6,), LENGTH), door.Gone(("a", 1)))
    driver.beats(29, "r1")
    assert not driver.core.idle
    driver.beats(1.5, "r1")
    assert driver.core.idle


def test_fin_ack_of_a_running_sequence_ends_it_and_leaves_the_others() -> None:
    driver = decode()
    driver.say(decode_job(source=None, slot=5, seeds=(1, 2), outputs=((), ())))
    driver.engine(token("a", 1, 0, (1,)), token("a", 1, 0, (2,), sequence=1))
    driver.say(FinAck("r1", 7, (5,)))
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1), 0)]
    driver.engine(token("a", 1, 1, (3,)), token("a", 1, 1, (4,), STOP, sequence=1), door.Gone(("a", 1)))
    assert [(row.slot, row.ids) for row in driver.rows()] == [(6, (4,))]
    driver.say(FinAck("r1", 7, (6,)))
    assert driver.core.idle


def test_fin_ack_of_all_that_is_still_fetched_waits_for_the_copy() -> None:
    driver = decode()
    fetching(driver)
    driver.say(FinAck("r1", 7, (0,)))
    assert driver.commands == [AbandonFetch(("a", 1))]
    driver.event(fetched())
    assert len(driver.commands) == 1
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]


def test_a_preempted_job_is_told_and_gone() -> None:
    driver = decode()
    running(driver)
    driver.engine(token("a", 1, 2, (6,)), door.Preempted(("a", 1)))
    assert driver.rows() == [TokenRow(0, 1, 2, (6,))]
    assert driver.published(Preempted, R1) == [Preempted("a", "w", 1)]
    assert driver.to_engine(door.Abort) == []
    assert driver.core.idle
    assert refused(driver.say(amend())).reason is RefuseReason.UNKNOWN


def test_a_job_that_the_engine_rejects_is_told_as_preempted() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(door.Rejected(("a", 1), "no room"))
    assert driver.published(Preempted, R1) == [Preempted("a", "w", 1)]


def test_a_job_under_which_the_engine_raised_ends_in_error_rows() -> None:
    driver = decode()
    running(driver)
    driver.engine(door.Failed(("a", 1), "it raised"))
    assert driver.rows() == [TokenRow(0, 1, 2, (), ERROR)]
    driver.say(Resume("r1", 7, (ResumeRow("a", 1, 0, 1),)))
    assert driver.rows() == [TokenRow(0, 1, 1, (5,), ERROR)]


# --- amend ---


def test_an_amend_drops_what_was_here_and_reserves_anew_under_its_number() -> None:
    driver = decode()
    running(driver)
    first = accepted(driver.say(amend(outputs=((77, 5),), pa=2)))
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    (add,) = driver.to_engine(door.Add)
    assert (add.key, add.ids, add.outputs) == (("a", 2), (*PROMPT, 77, 5), ((77, 5),))
    assert driver.say(amend(outputs=((77, 5),), pa=2)) == first
    assert driver.to_engine(door.Add) == []
    driver.engine(token("a", 1, 2, (9,)), reserved("a", 2))
    assert driver.rows() == []
    driver.say(kv_ready(pa=1))
    assert driver.of(Fetch) == []
    driver.say(kv_ready(pa=2, ids=(*PROMPT, 77, 5)))
    assert [fetch.key for fetch in driver.of(Fetch)] == [("a", 2)]


def test_an_amend_to_local_reads_the_prompt_here() -> None:
    driver = decode()
    driver.say(decode_job())
    accepted(driver.say(amend(source=None)))
    assert driver.to_engine(door.Add)[0].mode is door.Mode.LOCAL


def test_an_amend_during_a_fetch_keeps_the_copied_blocks_promised_until_the_copy_ends() -> None:
    driver = decode()
    fetching(driver)
    accepted(driver.say(amend()))
    assert driver.of(AbandonFetch) == [AbandonFetch(("a", 1))]
    assert driver.core.promised_blocks == 5 + 3
    driver.event(fetched("a", 1))
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert driver.core.promised_blocks == 5


def test_an_amend_of_what_is_not_here_is_refused_with_the_same_answer_twice() -> None:
    driver = decode()
    answer = refused(driver.say(amend()))
    assert answer.reason is RefuseReason.UNKNOWN
    assert driver.say(amend()) == answer


def test_an_amend_that_does_not_fit_loses_the_job() -> None:
    driver = decode(blocks=10)
    fetching(driver)
    accepted(driver.say(decode_job("b", slot=1, params=SamplingParams(max_tokens=4))))
    answer = refused(driver.say(amend("a")))  # 3 blocks are still being copied into
    assert answer.reason is RefuseReason.FULL
    assert driver.say(amend("a")) == answer
    assert refused(driver.say(amend("a", 3))).reason is RefuseReason.UNKNOWN


# --- time ---


def test_a_jobs_own_time_ends_it() -> None:
    driver = decode()
    driver.say(decode_job("a", ttl_s=5.0))
    driver.after(5.0)
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert driver.core.idle


def test_the_work_of_a_router_that_fell_silent_ends_and_leaves_tombstones() -> None:
    driver = decode()
    driver.say(decode_job("a"))
    driver.say(decode_job("b", router="r2"))
    driver.beats(6, "r2")
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]
    assert refused(driver.say(decode_job("a"))).reason is RefuseReason.STALE_ATTEMPT


def test_a_router_that_comes_back_is_told_that_nothing_of_its_work_is_here() -> None:
    driver = decode()
    driver.say(decode_job("a"))
    driver.beats(6)
    driver.beats(2, "r1")
    assert [digest.rows for digest in driver.published(Digest, R1)] == [(), ()]


def test_the_digest_tells_states_and_lengths_delivered_tokens_included() -> None:
    driver = decode()
    driver.say(decode_job("a", slot=0, outputs=((1, 2),)))
    fetching(driver, "b", 1)
    driver.say(decode_job("c", slot=2, seeds=(1, 2), outputs=((), ()), source=None))
    driver.engine(token("c", 1, 0, (4,)))
    driver.after(1)
    (digest,) = driver.published(Digest, R1)
    assert digest.rows == (
        DigestRow("a", 1, "reserved", (2,), 0),
        DigestRow("b", 1, "fetching", (0,), 1),
        DigestRow("c", 1, "running", (1, 0), 2),
    )


def test_a_draining_worker_takes_nothing_new_but_finishes_what_it_has() -> None:
    driver = decode()
    driver.say(decode_job("a"))
    driver.event(Drain())
    assert refused(driver.say(decode_job("b", slot=1))).reason is RefuseReason.DRAINING
    accepted(driver.say(amend("a", source=None)))
    assert not driver.core.idle


def test_wake_at_is_never_in_the_past_after_a_tick() -> None:
    driver = decode()
    fetching(driver, "a", 0)
    driver.say(decode_job("b", slot=1, ttl_s=30.0))
    for step in range(400):
        driver.after(0.37)
        if step % 50 == 0:
            driver.beats(3)
        at = driver.core.wake_at()
        assert at is None or at > driver.now


def test_events_of_what_is_over_or_was_never_here_change_nothing() -> None:
    driver = decode()
    for message in (cancel("x"), kv_ready("x"), FinAck("r1", 7, (9,)), RenewAnswer(("h",))):
        driver.say(message)
        assert driver.commands == []
    failed = FetchFailed(("x", 1), FailReason.FENCED, "")
    for event in (fetched("x"), failed, Unanswered("some other tag", NoAnswer.TIMEOUT)):
        driver.event(event)
        assert driver.commands == []
    driver.engine(token("x", 1, 0, (1,)), reserved("x"), door.Gone(("x", 1)), door.Preempted(("x", 1)))
    assert driver.commands == []
    assert driver.core.idle


# --- blocks that come before the prompt is done ---


def early(tokens: int, *blocks: int, **changes: Any) -> KvReady:
    """Blocks (numbers at the owner) that end at `tokens`, of the prompt of `kv_ready`."""
    groups = (GroupBlocks(0, blocks, tuple(850 + block for block in blocks)),)
    part = handle(ids=PROMPT[:tokens], groups=groups, **changes)
    return kv_ready(handle=part, tokens_ready=tokens, final=False, index=0, first_ids=(), finishes=())


def moves(fetch: Fetch) -> list[tuple[int, int]]:
    return [(pair.remote, pair.local) for pair in fetch.pairs]


def test_whole_blocks_are_fetched_while_the_prompt_is_computed_and_only_the_rest_at_its_end() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(early(4, 50))
    (first,) = driver.of(Fetch)
    assert (moves(first), first.tokens) == ([(50, 10)], 4)
    driver.event(Fetched(("a", 1), 100, 1, "shm", 0.5))
    assert driver.commands == []
    driver.say(kv_ready())
    (rest,) = driver.of(Fetch)
    assert (moves(rest), rest.tokens) == ([(51, 11), (52, 12)], 6)
    driver.event(Fetched(("a", 1), 200, 2, "shm", 0.02))
    assert driver.to_engine(door.Loaded) == [door.Loaded(("a", 1), 0, (77,))]
    (loaded,) = driver.published(KvLoaded)
    assert (loaded.bytes, loaded.blocks, loaded.transfer_s) == (300, 3, 0.02)


def test_a_job_has_one_copy_at_a_time_and_takes_together_what_came_meanwhile() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(early(4, 50))
    assert len(driver.of(Fetch)) == 1
    driver.say(early(8, 51))
    assert driver.of(Fetch) == []
    driver.say(kv_ready())
    assert driver.of(Fetch) == []
    driver.event(Fetched(("a", 1), 100, 1, "shm", 0.02))
    assert [moves(fetch) for fetch in driver.of(Fetch)] == [[(51, 11), (52, 12)]]


def test_an_early_message_before_the_reservation_is_not_forgotten_and_a_double_copies_nothing_twice() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.say(early(4, 50))
    driver.say(early(4, 50))
    driver.engine(reserved())
    assert [moves(fetch) for fetch in driver.of(Fetch)] == [[(50, 10)]]
    driver.event(Fetched(("a", 1), 100, 1, "shm", 0.02))
    driver.say(early(4, 50))
    assert driver.of(Fetch) == []


def test_what_is_cached_here_is_not_fetched_early_either() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved(cached=1))
    driver.say(early(8, 50, 51))
    assert [moves(fetch) for fetch in driver.of(Fetch)] == [[(51, 11)]]


def test_an_early_message_that_was_lost_costs_only_time() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(early(8, 51))
    driver.event(Fetched(("a", 1), 100, 1, "shm", 0.02))
    driver.say(kv_ready())
    assert [moves(fetch) for fetch in driver.of(Fetch)] == [[(50, 10), (52, 12)]]


def test_an_early_copy_that_failed_is_made_again_at_the_end_and_no_other_is_begun_before() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(early(4, 50))
    driver.event(FetchFailed(("a", 1), FailReason.FENCED, "moved"))
    assert driver.commands == []
    driver.say(early(8, 51))
    assert driver.of(Fetch) == []
    driver.say(kv_ready())
    assert [moves(fetch) for fetch in driver.of(Fetch)] == [[(50, 10), (51, 11), (52, 12)]]


def test_an_early_copy_counts_only_where_the_final_handle_names_the_same_generation() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(early(8, 60, 51))
    driver.event(Fetched(("a", 1), 200, 2, "shm", 0.02))
    driver.say(kv_ready())
    assert [moves(fetch) for fetch in driver.of(Fetch)] == [[(50, 10), (52, 12)]]


@pytest.mark.parametrize(
    "message",
    [
        early(4, 50, owner="q"),
        early(4, 50, incarnation=4),
        early(4, 50, pa=2),
        early(4, 50, fingerprint="f2"),
        early(4, 50, chain_hash="00" * 16),
        early(4, 49, 50),
        early(10, 50, 51, 52),
    ],
    ids=["owner", "life", "attempt", "model", "tokens", "more blocks than tokens", "a block that is not full"],
)
def test_an_early_message_of_anything_else_is_not_fetched(message: KvReady) -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(message)
    assert driver.commands == []


@pytest.mark.parametrize("over", [cancel(), amend()], ids=["cancelled", "amended"])
def test_an_end_during_an_early_copy_frees_its_blocks_behind_it(over: Message) -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(early(4, 50))
    driver.say(over)
    assert driver.of(AbandonFetch) == [AbandonFetch(("a", 1))]
    assert driver.to_engine(door.Abort) == []
    driver.event(FetchFailed(("a", 1), FailReason.UNREACHABLE, "abandoned"))
    assert driver.to_engine(door.Abort) == [door.Abort(("a", 1))]


def test_a_first_token_that_ends_the_answer_ends_its_early_copy() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(early(4, 50))
    driver.say(kv_ready(finishes=(int(STOP),)))
    assert driver.of(AbandonFetch) == [AbandonFetch(("a", 1))]
    driver.event(Fetched(("a", 1), 100, 1, "shm", 0.02))
    assert driver.to_engine(door.Loaded) == []
    driver.say(FinAck("r1", 7, (0,)))
    assert driver.core.idle


def test_the_lease_is_renewed_while_the_final_copy_waits_for_an_early_one() -> None:
    driver = decode()
    driver.say(decode_job())
    driver.engine(reserved())
    driver.say(early(4, 50))
    driver.say(kv_ready())
    driver.after(3.0)
    assert [renew.handle_ids for renew in driver.published(Renew)] == [("h-a-1",)]
