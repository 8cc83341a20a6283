"""A prompt that waits behind others is read by whoever becomes free."""

from __future__ import annotations

import pytest

from splitserve.protocol.messages import Amend, Cancel, DecodeJob, DigestRow, PrefillJob, Release
from splitserve.protocol.states import PrefillState, RequestState
from support.router_bench import Bench


def waiting(bench: Bench, *rids: str, ids: int = 1000) -> dict[str, tuple[DecodeJob, PrefillJob]]:
    """Each has its prefill accepted; the only prefill worker reads the first."""
    return {rid: bench.prefilling(rid=rid, ids=ids, cache_salt=rid) for rid in rids}


def joins(bench: Bench) -> None:
    bench.workers.append(("p1", "prefill"))
    bench.beats()


def test_a_worker_that_joins_reads_the_first_prompt_that_waits():
    bench = Bench(decodes=1)
    jobs = waiting(bench, "a", "b", "c")
    joins(bench)
    asked, amend = bench.take(Amend)
    assert (amend.rid, amend.source and amend.source.worker) == ("b", "p1")
    asked_of, prefill = bench.asked(PrefillJob)[0]
    assert (prefill.rid, prefill.pa) == ("b", jobs["b"][1].pa + 1)
    assert ".p1." in asked_of.subject
    assert [(to, cancel.rid, cancel.pa) for to, cancel in bench.published(Cancel)] == [("p0", "b", jobs["b"][1].pa)]
    assert bench.core.counts["replaced|prefill|moved"] == 1
    assert ".d0." in asked.subject


def test_one_prompt_moves_at_a_time_for_each_that_is_free():
    bench = Bench(decodes=1)
    waiting(bench, "a", "b", "c", "d", "e")
    bench.workers += [("p1", "prefill"), ("p2", "prefill")]
    bench.beats()
    bench.beats()
    assert [(job.rid, ask.subject.split(".")[3]) for ask, job in bench.asked(PrefillJob)] == [("b", "p1"), ("c", "p2")]


def test_the_prompt_that_is_read_stays():
    bench = Bench(decodes=1)
    waiting(bench, "a")
    joins(bench)
    assert not bench.asked(Amend)


def test_a_worker_that_is_through_takes_the_next_from_another():
    bench = Bench(decodes=1, prefills=2)
    jobs = waiting(bench, "a", "b", "c", "d")  # p0: a and c, p1: b and d
    bench.run(0.05)
    assert not bench.asked(Amend)
    bench.kv_ready(jobs["a"][1])
    bench.kv_ready(jobs["c"][1])
    _, amend = bench.take(Amend)
    assert (amend.rid, amend.source and amend.source.worker) == ("d", "p0")


def test_a_prompt_of_which_something_is_read_stays():
    bench = Bench(decodes=1)
    jobs = waiting(bench, "a", "b")
    bench.digest("p0", *(_reads(job, 64) for _, job in jobs.values()), role="prefill")
    joins(bench)
    assert not bench.asked(Amend)


def _reads(job: PrefillJob, tokens: int) -> DigestRow:
    return DigestRow(job.rid, job.pa, PrefillState.RUNNING, (tokens,))


def test_a_decode_worker_that_has_nothing_to_read_takes_a_prompt_when_that_is_sooner():
    bench = Bench(split="auto", decodes=1)
    bench.submit("a", ids=1000, cache_salt="a")
    bench.accept(DecodeJob)  # read by decode, which is idle
    waiting(bench, "b", "c", ids=2000)
    decode = next(life for life in bench.core.lives().values() if life.request.rid == "a").request.decode
    assert decode is not None
    worker = bench.core.fleet.get("d0")
    assert worker is not None
    worker.rate_beside = worker.prefill_rate
    bench.row(decode.slot, decode.da, 0, 11)
    bench.row(decode.slot, decode.da, 1, 12, first=True)
    _, amend = bench.take(Amend)
    assert (amend.rid, amend.source) == ("c", None)
    assert worker.own.tokens == 2000


@pytest.mark.parametrize("split", ["always", "never"])
def test_no_prompt_is_read_where_split_forbids_it(split: str):
    bench = Bench(split=split, decodes=1)
    worker = bench.core.fleet.get("d0")
    assert worker is not None
    worker.rate_beside = 10_000.0 if split == "always" else 100.0  # elsewhere it would be sooner
    for rid in "abc":
        bench.submit(rid, ids=1000, cache_salt=rid)
        bench.accept(DecodeJob)
        if split == "always":
            bench.accept(PrefillJob)
    bench.run(0.2)
    assert not bench.asked(Amend)


def test_what_the_first_worker_still_says_of_a_moved_prompt_changes_nothing():
    bench = Bench(decodes=1)
    jobs = waiting(bench, "a", "b")
    joins(bench)
    bench.accept(Amend)
    bench.kv_ready(jobs["b"][1], token=5)
    assert bench.tokens("b") == []
    assert [release.handle_id for _, release in bench.asked(Release)] == [f"h-b-{jobs['b'][1].pa}"]
    bench.kv_ready(bench.accept(PrefillJob), token=6)
    assert bench.tokens("b") == [6]
    assert bench.state("b") is RequestState.TRANSFERRING


def test_a_moved_prompt_has_queued_where_it_waited_too():
    bench = Bench(decodes=1)
    waiting(bench, "a", "b")
    bench.run(0.25)
    joins(bench)
    bench.accept(Amend)
    bench.kv_ready(bench.accept(PrefillJob))  # 0.01 s queued there, 0.02 read
    life = bench.core.lives()["b"]
    assert life.request.stages.seconds(bench.now)["prefill_queue"] == pytest.approx(0.26)
