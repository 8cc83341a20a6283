"""Who is alive, judged only while we hear ourselves."""

from __future__ import annotations

from splitserve.worker.routers import Routers
from splitserve.worker.rules import Limits


def alive_until(routers: Routers, start: float, end: float, *names: str, own: bool = True) -> list[str]:
    """Beats every half second; whom `silent` named meanwhile."""
    named: list[str] = []
    now = start
    while now <= end:
        if own:
            routers.own_beat(now)
        for name in names:
            routers.beat(name, now)
        named += routers.silent(now)
        now += 0.5
    return named


def test_a_silent_router_is_named_once_a_silence() -> None:
    routers = Routers(Limits())
    routers.heard("r1", 0.0)
    assert alive_until(routers, 0.0, 20.0) == ["r1"]
    routers.beat("r1", 20.0)
    assert alive_until(routers, 20.5, 40.0) == ["r1"]


def test_a_router_that_never_asked_for_anything_is_nobodys_business() -> None:
    routers = Routers(Limits())
    routers.beat("r1", 0.0)
    assert alive_until(routers, 0.0, 20.0) == []
    assert routers.next_at() is None


def test_nobody_is_named_while_our_own_beat_is_missing_nor_two_seconds_after() -> None:
    routers = Routers(Limits())
    routers.heard("r1", 0.0)
    assert alive_until(routers, 0.0, 3.0, "r1") == []
    assert alive_until(routers, 3.5, 30.0, own=False) == []
    assert alive_until(routers, 30.5, 32.0) == []
    assert alive_until(routers, 32.5, 33.0) == ["r1"]


def test_a_waking_worker_names_nobody() -> None:
    routers = Routers(Limits())
    routers.heard("r1", 0.0)
    assert alive_until(routers, 0.0, 3.0, "r1") == []
    assert routers.silent(60.0) == []


def test_digests_are_due_each_second_for_routers_that_live() -> None:
    routers = Routers(Limits())
    routers.heard("r1", 0.0)
    routers.heard("r2", 0.0)
    assert (routers.digests_due(0.9), routers.digests_due(1.0), routers.digests_due(1.5)) == ([], ["r1", "r2"], [])
    assert alive_until(routers, 1.5, 10.0, "r2") == ["r1"]
    assert routers.digests_due(10.0) == ["r2"]


def test_a_router_that_stays_silent_is_forgotten() -> None:
    routers = Routers(Limits())
    routers.heard("r1", 0.0)
    alive_until(routers, 0.0, 10.0)
    for second in range(10, 700):
        assert routers.digests_due(float(second)) == []
    assert routers.next_at() is None
