"""The account of one worker: promises, what waits to be read, and at which rate."""

from __future__ import annotations

from splitserve.router.account import Load, Worker
from support.router_bench import worker_beat

NOW = 50.0
JOB, A, B, C = ("job", 0), ("a", 0), ("b", 0), ("c", 0)


def decode() -> Worker:
    return Worker(worker_beat("d0", "decode"), NOW)


def test_own_promises_count_at_once_and_beats_add_only_what_is_not_ours():
    d0 = decode()
    d0.promise(A, Load(tokens=100, blocks=10, context=100), NOW)
    assert d0.load == Load(100, 10, 100)
    d0.correct(worker_beat("d0", "decode", queued_tokens=150, promised_blocks=8, running=1))
    assert d0.load == Load(150, 10, 100)
    d0.drop(A, NOW)
    d0.correct(worker_beat("d0", "decode", queued_tokens=50, promised_blocks=4, running=0))
    assert d0.load == Load(50, 4, 0)


def test_a_promise_under_the_same_key_takes_the_place_of_the_former():
    d0 = decode()
    d0.promise(A, Load(blocks=10, context=100), NOW)
    d0.promise(A, Load(tokens=100, blocks=10, context=100), NOW)
    assert d0.load == Load(100, 10, 100)


def test_what_is_read_of_the_oldest_prompt_is_reckoned_from_its_worker_s_rate():
    d0 = decode()
    d0.rate_beside = 100.0
    for key in (A, B):
        d0.promise(key, Load(tokens=200, blocks=10, context=200), NOW)
    assert d0.queued_tokens(NOW + 0.5) == 350
    assert d0.queued_tokens(NOW + 60) == 200  # never the next one's
    d0.computed(A, NOW + 1)
    assert d0.queued_tokens(NOW + 1) == 200
    assert d0.queued_tokens(NOW + 2) == 100


def test_reading_begins_again_with_the_next_prompt_when_the_oldest_is_dropped():
    d0 = decode()
    d0.rate_beside = 100.0
    for key in (A, B, C):
        d0.promise(key, Load(tokens=200, blocks=10, context=200), NOW)
    d0.drop(B, NOW + 1)  # it waited: the oldest is read on
    assert d0.queued_tokens(NOW + 1) == 300
    d0.drop(A, NOW + 1)
    assert d0.queued_tokens(NOW + 1) == 200


def test_a_prefill_worker_reads_at_its_own_rate_and_an_idle_decode_worker_as_if_alone():
    d0 = decode()
    d0.prefill_rate, d0.rate_beside = 900.0, 300.0
    assert d0.rate == 900.0
    d0.promise(JOB, Load(tokens=10, blocks=2, context=10), NOW)
    assert d0.rate == 300.0
    prefill = Worker(worker_beat("p0", "prefill"), NOW)
    prefill.prefill_rate = 700.0
    prefill.promise(JOB, Load(tokens=100), NOW)
    assert prefill.queued_tokens(NOW + 0.1) == 30


def test_a_computed_prompt_is_no_longer_before_others():
    d0 = decode()
    d0.promise(A, Load(tokens=100, blocks=10, context=100), NOW)
    d0.computed(A, NOW)
    d0.computed(A, NOW)
    assert d0.load == Load(0, 10, 100)
    d0.drop(A, NOW)
    d0.drop(A, NOW)
    assert d0.idle


def test_a_decode_workers_rate_is_kept_apart_by_whether_it_decoded_beside():
    d0 = decode()
    alone, beside = d0.prefill_rate, d0.rate_beside
    d0.promise(A, Load(tokens=100, blocks=10, context=100), NOW)
    d0.measured(1000, 0.1)
    assert d0.prefill_rate > alone
    assert d0.rate_beside == beside
    alone = d0.prefill_rate
    d0.promise(B, Load(tokens=100, blocks=10, context=100), NOW)
    d0.measured(1000, 10.0)
    d0.measured(8, 0.1)
    assert d0.prefill_rate == alone
    assert d0.rate_beside < beside


def test_a_pool_is_promised_to_95_percent_but_an_idle_worker_is_always_asked():
    d0 = decode()
    assert d0.has_room(5000)
    d0.promise(A, Load(blocks=900), NOW)
    assert d0.has_room(50)
    assert not d0.has_room(51)


def test_a_prompt_waits_behind_what_is_left_of_those_before_it():
    d0 = decode()
    d0.rate_beside = 100.0
    assert list(d0.waiting(NOW)) == []
    for key in (A, B, C):
        d0.promise(key, Load(tokens=200, blocks=10, context=200), NOW)
    assert list(d0.waiting(NOW + 0.5)) == [(B, 150), (C, 350)]
    d0.computed(A, NOW + 0.5)
    assert list(d0.waiting(NOW + 0.5)) == [(C, 200)]


def test_a_worker_is_free_when_nobody_has_given_it_anything_to_read():
    d0 = decode()
    assert d0.free
    d0.correct(worker_beat("d0", "decode", queued_tokens=100))  # another router's
    assert not d0.free
    d0.correct(worker_beat("d0", "decode"))
    d0.promise(JOB, Load(tokens=10, blocks=2, context=10), NOW)
    assert not d0.free
    d0.computed(JOB, NOW)
    assert d0.free
    d0.correct(worker_beat("d0", "decode", draining=True))
    assert not d0.free
