"""Signs of life and judgement."""

from __future__ import annotations

from typing import Any

from splitserve.protocol.messages import Beat
from splitserve.router.account import Load, Worker
from splitserve.router.fleet import Fleet
from splitserve.router.rules import Rules
from support.router_bench import worker_beat

OWN = ("router-0", 7)
D0 = ("d0", 1)


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
        self.d0.promise(("job", 0), Load(tokens=10, blocks=2, context=10), self.now)


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


def test_a_new_worker_counts_as_fast_as_the_most_used_of_its_like():
    watch = Watch()
    watch.work()
    watch.d0.prefill_rate, watch.d0.rate_beside = 700.0, 90.0
    watch.beat("unused")
    watch.fleet.on_beat(worker_beat("p0", "prefill"), watch.now)
    watch.beat("other", fingerprint="another")
    watch.beat("d1")
    rates = {w.beat.name: (w.prefill_rate, w.rate_beside) for w in watch.fleet}
    unmeasured = Worker(worker_beat("x", "decode"), watch.now)
    assert rates["unused"] == rates["d1"] == (700.0, 90.0)
    assert rates["p0"] == rates["other"] == (unmeasured.prefill_rate, unmeasured.rate_beside)


def test_a_restarted_worker_keeps_the_rate_of_its_former_life():
    watch = Watch()
    watch.work()
    watch.d0.prefill_rate = 700.0
    assert watch.beat("d0", 2) == D0
    assert watch.d0.life == ("d0", 2)
    assert watch.d0.prefill_rate == 700.0
