"""Where a request goes, and why."""

from __future__ import annotations

from dataclasses import replace

from splitserve.router.placement import Candidate, Need, NotPlaced, Placed, Split, place, sooner

IDLE = Candidate(
    name="d0",
    fingerprint="f",
    factors=(("dtype", "bfloat16"),),
    cached_tokens=0,
    queued_tokens=0,
    context=0,
    idle=True,
    room=True,
    placed=0,
    rate=1000.0,
    chunk_tokens=64,
    bytes_per_token=20_000,
)
BUSY = replace(IDLE, idle=False, context=500, running=10)
PREFILL = replace(IDLE, name="p0", chunk_tokens=512)


def need(tokens: int = 1000, split: Split = Split.AUTO, **changes: object) -> Need:
    return replace(Need(tokens, split), **changes)  # type: ignore[arg-type]


def placed(*args: object) -> Placed:
    found = place(*args)  # type: ignore[arg-type]
    assert isinstance(found, Placed)
    return found


def test_an_idle_decode_worker_reads_the_prompt_itself():
    assert placed(need(), [IDLE], [PREFILL]).prefill is None


def test_a_busy_decode_worker_leaves_a_long_prompt_to_prefill():
    assert placed(need(), [BUSY], [replace(PREFILL, rate=4000.0)]).prefill == "p0"


def test_what_fits_into_one_chunk_is_read_by_decode():
    slow = replace(BUSY, rate=100.0)  # by the estimate prefill would be faster
    assert placed(need(1000), [replace(slow, cached_tokens=936)], [PREFILL]).prefill is None
    assert placed(need(64), [slow], [PREFILL]).prefill is None
    assert placed(need(65), [slow], [PREFILL]).prefill == "p0"


def test_of_many_short_prompts_at_once_decode_reads_ten_chunks_itself():
    slow = replace(BUSY, rate=100.0)
    assert placed(need(64), [replace(slow, queued_tokens=576)], [PREFILL]).prefill is None
    assert placed(need(64), [replace(slow, queued_tokens=577)], [PREFILL]).prefill == "p0"


def test_a_prefill_queue_twice_as_long_makes_local_the_better_way_beside_ten_sequences():
    assert placed(need(200), [BUSY], [replace(PREFILL, queued_tokens=190)]).prefill == "p0"
    assert placed(need(200), [BUSY], [replace(PREFILL, queued_tokens=210)]).prefill is None


def test_the_fewer_sequences_a_chunk_delays_the_sooner_a_prompt_is_read_by_decode():
    few, many = replace(BUSY, running=2), replace(BUSY, running=30)
    assert placed(need(200), [few], [replace(PREFILL, queued_tokens=60)]).prefill is None
    assert placed(need(200), [many], [replace(PREFILL, queued_tokens=500)]).prefill == "p0"
    assert placed(need(200), [many], [replace(PREFILL, queued_tokens=700)]).prefill is None


def test_split_always_and_never_overrule_every_estimate():
    assert placed(need(10, Split.ALWAYS), [IDLE], [PREFILL]).prefill == "p0"
    assert placed(need(5000, Split.NEVER), [BUSY], [PREFILL]).prefill is None


def test_without_a_prefill_worker_decode_reads_the_prompt():
    assert placed(need(5000), [BUSY], []).prefill is None


def test_without_a_prefill_worker_split_always_waits_and_holds_up_nobody():
    found = place(need(split=Split.ALWAYS), [IDLE], [])
    assert isinstance(found, NotPlaced)
    assert not found.for_good
    assert not found.full


def test_a_prefill_worker_without_room_is_passed_over():
    busy = replace(PREFILL, room=False)
    assert placed(need(5000), [BUSY], [busy, replace(PREFILL, name="p1", rate=9000.0)]).prefill == "p1"
    assert isinstance(place(need(split=Split.ALWAYS), [IDLE], [busy]), NotPlaced)


def test_prefill_of_another_fingerprint_is_not_used_and_the_factor_is_named():
    other = replace(PREFILL, fingerprint="g", factors=(("dtype", "float32"),))
    assert placed(need(5000), [BUSY], [other]).prefill is None
    found = place(need(split=Split.ALWAYS), [IDLE], [other])
    assert isinstance(found, NotPlaced)
    assert found.for_good
    assert found.reason == "d0 and p0 differ in dtype: bfloat16 and float32"


def test_a_long_cached_prefix_attracts_and_promised_load_repels():
    near, far = replace(BUSY, name="near", cached_tokens=800), replace(BUSY, name="far")
    assert placed(need(), [far, near], []).decode == "near"
    assert placed(need(), [far, replace(near, context=2000)], []).decode == "far"


def test_equal_workers_take_turns():
    assert placed(need(), [replace(IDLE, placed=3), replace(IDLE, name="d1", placed=2)], []).decode == "d1"


def test_a_worker_that_gave_the_request_up_is_asked_last_but_asked():
    other = replace(IDLE, name="d1", context=9000)
    assert placed(need(last="d0"), [IDLE, other], []).decode == "d1"
    assert placed(need(last="d0"), [IDLE], []).decode == "d0"


def test_a_moved_long_context_goes_back_through_prefill_even_when_decode_is_idle():
    assert placed(need(513, moved=True), [IDLE], [PREFILL]).prefill == "p0"
    assert placed(need(512, moved=True), [IDLE], [PREFILL]).prefill is None


def test_full_decode_workers_hold_up_those_behind_too():
    found = place(need(), [replace(IDLE, room=False)], [PREFILL])
    assert isinstance(found, NotPlaced)
    assert found.full
    nobody = place(need(), [], [PREFILL])
    assert isinstance(nobody, NotPlaced)
    assert not nobody.full


def test_a_prompt_that_waits_is_read_by_a_free_worker_that_is_through_a_tenth_sooner():
    waits, other = replace(PREFILL, queued_tokens=100), replace(PREFILL, name="p1")
    assert not sooner(need(1000), waits, other, BUSY)  # 1,000 for 1,100 and both ways over the bus
    assert sooner(need(1000), replace(waits, queued_tokens=150), other, BUSY)
    assert not sooner(need(1000), replace(waits, queued_tokens=150), replace(other, rate=900.0), BUSY)


def test_a_prompt_that_waits_is_read_beside_decodes_only_if_that_is_worth_what_it_delays():
    waits = replace(PREFILL, queued_tokens=900)
    assert sooner(need(1000), waits, replace(BUSY, running=5), replace(BUSY, running=5))
    assert not sooner(need(1000), waits, replace(BUSY, running=9), replace(BUSY, running=9))
    full = replace(BUSY, running=5, room=False)  # its answer has its place there already
    assert sooner(need(1000), waits, full, full)


def test_a_prompt_that_waits_beside_decodes_is_read_by_a_free_prefill_worker():
    waits = replace(BUSY, queued_tokens=100)
    assert sooner(need(1000), waits, PREFILL, BUSY)
    assert not sooner(need(1000), waits, replace(PREFILL, room=False), BUSY)
    assert not sooner(need(1000), waits, replace(PREFILL, fingerprint="g"), BUSY)
    assert not sooner(need(1000), waits, replace(PREFILL, rate=100.0), BUSY)


def test_a_short_prompt_is_read_where_it_waits_unless_many_are_before_it():
    waits = replace(BUSY, queued_tokens=500, rate=100.0)
    assert not sooner(need(64), waits, PREFILL, BUSY)
    assert sooner(need(64), replace(waits, queued_tokens=600), PREFILL, BUSY)
    assert sooner(need(64), replace(PREFILL, name="p1", queued_tokens=500), PREFILL, BUSY)


def test_a_prompt_that_waits_is_moved_only_to_where_split_lets_it_be_read():
    waits, other = replace(PREFILL, queued_tokens=5000), replace(PREFILL, name="p1")
    assert sooner(need(1000, Split.ALWAYS), waits, other, IDLE)
    assert not sooner(need(1000, Split.ALWAYS), waits, IDLE, IDLE)
    assert not sooner(need(1000, Split.NEVER), replace(IDLE, queued_tokens=5000), PREFILL, IDLE)
