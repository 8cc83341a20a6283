"""Signs of life, judgement, and promises."""

from __future__ import annotations

from typing import Any

from splitserve.protocol.messages import Beat
from splitserve.router.fleet import Fleet, Load, Worker
from splitserve.router.rules import Rules
from support.router_bench import worker_beat

OWN = ("router-0", 7)
D0 = ("d0", 1)
JOB, A, B, C = ("job", 0), ("a", 0), ("b", 0), ("c", 0)


class Watch:
    """A fleet, its clock, and a router that hears itself unless told otherwise."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.fleet = Fleet(OWN, rules or Rules())
        self.now = 50.0
        self.own()
        self.beat("d0")

    def own(self) -> None:
        self.fleet.on_beat(Beat(*OWN_BEAT), self.now)

    def beat(self, name: str, incarnation: int = 1, **changes: Any) -> tuple[str, int] | None:
        return self.fleet.on_beat(worker_beat(name, "decode", incarnation, **changes), self.now)

    def wait(self, seconds: float, *, own: bool = True) -> tuple[list[str], list[tuple[str, int]]]:
        """Time passes in small steps; what was to be pinged and who was lost on the way."""
        pings: list[str] = []
        lost: list[tuple[str, int]] = []
        for _ in range(round(seconds / 0.05)):
            self.now += 0.05
            if own:
                self.own()
            ping, dead = self.fleet.judge(self.now)
            pings += [w.beat.name for w in ping]
            lost += dead
        return pings, lost

    @property
    def d0(self) -> Worker:
        worker = self.fleet.get("d0")
        assert worker is not None
        return worker

    def work(self) -> None:
        self.d0.promise(JOB, Load(tokens=10, blocks=2, context=10), self.now)


OWN_BEAT = ("router-0", "router", 7)


def test_a_worker_with_work_is_pinged_after_300_ms_of_silence_once():
    watch = Watch()
    watch.work()
    assert watch.wait(0.25) == ([], [])
    assert watch.wait(0.5) == (["d0"], [])


def test_a_worker_without_work_is_not_pinged():
    watch = Watch()
    assert watch.wait(1.5) == ([], [])


def test_no_responders_to_a_ping_is_death_now():
    watch = Watch()
    watch.work()
    watch.wait(0.4)
    assert watch.fleet.pinged(D0, answered=False, gone=True, now=watch.now) == D0
    assert not watch.d0.alive
    assert watch.fleet.pinged(D0, answered=False, gone=True, now=watch.now) is None


def test_a_ping_that_times_out_makes_a_suspect_who_gets_no_new_work_until_it_is_heard():
    watch = Watch()
    watch.work()
    watch.wait(0.4)
    assert watch.fleet.pinged(D0, answered=False, gone=False, now=watch.now) is None
    assert watch.d0.alive
    assert not watch.d0.usable
    watch.fleet.heard(D0, watch.now)
    assert watch.d0.usable


def test_two_seconds_of_silence_are_death():
    watch = Watch()
    assert watch.wait(1.9)[1] == []
    assert watch.wait(0.2)[1] == [D0]


def test_a_worker_that_wakes_in_the_same_life_gets_work_again():
    watch = Watch()
    watch.wait(2.1)
    assert not watch.d0.usable
    watch.beat("d0")
    assert watch.d0.usable


def test_while_our_own_beat_is_not_heard_no_one_is_declared_dead():
    watch = Watch()
    watch.work()
    _, lost = watch.wait(5.0, own=False)
    assert lost == []
    assert watch.fleet.no_responders(D0, watch.now) is None
    assert watch.d0.alive


def test_nor_until_two_seconds_after_it_is_back():
    watch = Watch()
    watch.wait(3.0, own=False)
    assert watch.wait(1.9)[1] == []
    assert watch.wait(0.3)[1] == [D0]


def test_on_waking_our_own_silence_is_looked_at_first():
    watch = Watch()
    watch.now += 4.0
    assert watch.fleet.judge(watch.now) == ([], [])
    watch.own()
    assert watch.fleet.judge(watch.now) == ([], [])


def test_after_an_outage_of_our_connection_we_are_sick_until_we_hear_ourselves_again():
    watch = Watch()
    watch.fleet.on_bus(down=True)
    assert watch.fleet.sick(watch.now)
    watch.fleet.on_bus(down=False)
    assert watch.fleet.sick(watch.now)
    watch.own()
    watch.wait(1.9)
    assert watch.fleet.sick(watch.now)
    watch.wait(0.2)
    assert not watch.fleet.sick(watch.now)


def test_switched_off_the_own_beat_rule_kills_every_worker_of_a_sick_router():
    watch = Watch(Rules(own_beat_rule=False))
    assert watch.wait(3.0, own=False)[1] == [D0]


def test_a_new_life_under_the_same_name_proves_the_old_one_lost():
    watch = Watch()
    watch.work()
    assert watch.beat("d0", 2) == D0
    assert watch.d0.life == ("d0", 2)
    assert not watch.d0.promises


def test_a_late_beat_of_a_former_life_is_nothing():
    watch = Watch()
    watch.beat("d0", 2)
    assert watch.beat("d0", 1) is None
    assert watch.d0.life == ("d0", 2)


def test_a_wedged_engine_is_a_death_and_its_other_threads_do_not_revive_it():
    watch = Watch()
    assert watch.beat("d0", step_age_ms=10_001) == D0
    watch.fleet.heard(D0, watch.now)
    assert not watch.d0.alive
    watch.beat("d0", step_age_ms=5)
    assert watch.d0.alive


def test_draining_and_unready_workers_get_no_new_work():
    watch = Watch()
    watch.beat("d0", draining=True)
    assert not watch.d0.usable
    watch.beat("d0", ready=False)
    assert not watch.d0.usable
    watch.beat("d0")
    assert watch.d0.usable


def test_own_promises_count_at_once_and_beats_add_only_what_is_not_ours():
    watch = Watch()
    watch.d0.promise(A, Load(tokens=100, blocks=10, context=100), watch.now)
    assert watch.d0.load == Load(100, 10, 100)
    watch.beat("d0", queued_tokens=150, promised_blocks=8, running=1)
    assert watch.d0.load == Load(150, 10, 100)
    watch.d0.drop(A, watch.now)
    watch.beat("d0", queued_tokens=50, promised_blocks=4, running=0)
    assert watch.d0.load == Load(50, 4, 0)


def test_a_promise_under_the_same_key_takes_the_place_of_the_former():
    watch = Watch()
    watch.d0.promise(A, Load(blocks=10, context=100), watch.now)
    watch.d0.promise(A, Load(tokens=100, blocks=10, context=100), watch.now)
    assert watch.d0.load == Load(100, 10, 100)


def test_what_is_read_of_the_oldest_prompt_is_reckoned_from_its_worker_s_rate():
    watch = Watch()
    watch.d0.rate_beside = 100.0
    for key in (A, B):
        watch.d0.promise(key, Load(tokens=200, blocks=10, context=200), watch.now)
    assert watch.d0.queued_tokens(watch.now + 0.5) == 350
    assert watch.d0.queued_tokens(watch.now + 60) == 200  # never the next one's
    watch.d0.computed(A, watch.now + 1)
    assert watch.d0.queued_tokens(watch.now + 1) == 200
    assert watch.d0.queued_tokens(watch.now + 2) == 100


def test_reading_begins_again_with_the_next_prompt_when_the_oldest_is_dropped():
    watch = Watch()
    watch.d0.rate_beside = 100.0
    for key in (A, B, C):
        watch.d0.promise(key, Load(tokens=200, blocks=10, context=200), watch.now)
    watch.d0.drop(B, watch.now + 1)  # it waited: the oldest is read on
    assert watch.d0.queued_tokens(watch.now + 1) == 300
    watch.d0.drop(A, watch.now + 1)
    assert watch.d0.queued_tokens(watch.now + 1) == 200


def test_a_prefill_worker_reads_at_its_own_rate_and_an_idle_decode_worker_as_if_alone():
    watch = Watch()
    watch.d0.prefill_rate, watch.d0.rate_beside = 900.0, 300.0
    assert watch.d0.rate == 900.0
    watch.work()
    assert watch.d0.rate == 300.0
    prefill = Worker(worker_beat("p0", "prefill"), watch.now)
    prefill.prefill_rate = 700.0
    prefill.promise(JOB, Load(tokens=100), watch.now)
    assert prefill.queued_tokens(watch.now + 0.1) == 30


def test_a_computed_prompt_is_no_longer_before_others():
    watch = Watch()
    watch.d0.promise(A, Load(tokens=100, blocks=10, context=100), watch.now)
    watch.d0.computed(A, watch.now)
    watch.d0.computed(A, watch.now)
    assert watch.d0.load == Load(0, 10, 100)
    watch.d0.drop(A, watch.now)
    watch.d0.drop(A, watch.now)
    assert watch.d0.idle


def test_a_decode_workers_rate_is_kept_apart_by_whether_it_decoded_beside():
    watch = Watch()
    alone, beside = watch.d0.prefill_rate, watch.d0.rate_beside
    watch.d0.promise(A, Load(tokens=100, blocks=10, context=100), watch.now)
    watch.d0.measured(1000, 0.1)
    assert watch.d0.prefill_rate > alone
    assert watch.d0.rate_beside == beside
    alone = watch.d0.prefill_rate
    watch.d0.promise(B, Load(tokens=100, blocks=10, context=100), watch.now)
    watch.d0.measured(1000, 10.0)
    watch.d0.measured(8, 0.1)
    assert watch.d0.prefill_rate == alone
    assert watch.d0.rate_beside < beside


def test_a_pool_is_promised_to_95_percent_but_an_idle_worker_is_always_asked():
    watch = Watch()
    assert watch.d0.has_room(5000)
    watch.d0.promise(A, Load(blocks=900), watch.now)
    assert watch.d0.has_room(50)
    assert not watch.d0.has_room(51)


def test_the_time_to_look_again_is_always_later_than_the_last_look():
    watch = Watch()
    watch.work()
    for _ in range(200):
        watch.own()
        at = watch.fleet.wake_at(watch.now)
        if at is None:
            break
        watch.now = min(at, watch.now + 0.5)  # our own beat comes that often
        watch.fleet.judge(watch.now)
        again = watch.fleet.wake_at(watch.now)
        assert again is None or again > watch.now
    assert not watch.d0.alive


def test_a_prompt_waits_behind_what_is_left_of_those_before_it():
    watch = Watch()
    watch.d0.rate_beside = 100.0
    assert list(watch.d0.waiting(watch.now)) == []
    for key in (A, B, C):
        watch.d0.promise(key, Load(tokens=200, blocks=10, context=200), watch.now)
    assert list(watch.d0.waiting(watch.now + 0.5)) == [(B, 150), (C, 350)]
    watch.d0.computed(A, watch.now + 0.5)
    assert list(watch.d0.waiting(watch.now + 0.5)) == [(C, 200)]


def test_a_worker_is_free_when_nobody_has_given_it_anything_to_read():
    watch = Watch()
    assert watch.d0.free
    watch.beat("d0", queued_tokens=100)  # another router's
    assert not watch.d0.free
    watch.beat("d0")
    watch.work()
    assert not watch.d0.free
    watch.d0.computed(JOB, watch.now)
    assert watch.d0.free
    watch.beat("d0", draining=True)
    assert not watch.d0.free
