"""Who is on the fleet's page, and that its sums do not fall."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitserve.router.account import Life
from splitserve.router.exposition import Page
from splitserve.router.federation import Federation

HELP = "# HELP tokens_total Tokens.\n# TYPE tokens_total counter\n"
GAUGE = "# HELP running Running.\n# TYPE running gauge\n"
OWN = f'{HELP}tokens_total{{engine="r0"}} 1.0\n'


def text(engine: str, tokens: float, **by_reason: float) -> str:
    reasons = "".join(f'tokens_total{{engine="{engine}",reason="{r}"}} {v}\n' for r, v in by_reason.items())
    return f'{HELP}tokens_total{{engine="{engine}"}} {tokens}\n{reasons}{GAUGE}running{{engine="{engine}"}} 1.0\n'


def total(page: Page) -> float:
    return sum(page["tokens_total"].values().values())


def running(page: Page) -> list[str]:
    return list(page["running"].values()) if "running" in page else []


def test_the_living_are_shown_beside_this_router() -> None:
    fleet = Federation()
    fleet.took(("d0", 1), text("d0", 5))
    fleet.living([("d0", 1)], 0)
    assert total(fleet.page(OWN)) == 6
    assert running(fleet.page(OWN)) == ['running{engine="d0"}']


def test_gauges_of_the_dead_vanish_at_once_and_their_counters_stay_a_quarter_of_an_hour() -> None:
    fleet = Federation()
    fleet.took(("d0", 1), text("d0", 5))
    fleet.living([], 100)
    assert running(fleet.page(OWN)) == []
    fleet.living([], 1000)
    assert total(fleet.page(OWN)) == 6
    fleet.living([], 1000.1)
    assert total(fleet.page(OWN)) == 1
    assert len(fleet) == 0


def test_who_was_only_silent_is_shown_again() -> None:
    fleet = Federation()
    fleet.took(("d0", 1), text("d0", 5))
    fleet.living([], 100)
    fleet.living([("d0", 1)], 101)
    assert running(fleet.page(OWN)) == ['running{engine="d0"}']
    fleet.living([], 900)
    fleet.living([], 1700)
    assert len(fleet) == 1, "its quarter of an hour begins at its last death"


def test_a_worker_that_comes_back_at_zero_goes_on_where_it_was() -> None:
    fleet = Federation()
    fleet.took(("d0", 1), text("d0", 5, stop=2))
    fleet.took(("d0", 2), text("d0", 1))
    assert fleet.page(OWN)["tokens_total"].values() == {
        'tokens_total{engine="r0"}': 1,
        'tokens_total{engine="d0"}': 6,
        'tokens_total{engine="d0",reason="stop"}': 2,
    }
    assert running(fleet.page(OWN)) == ['running{engine="d0"}'], "a gauge is the new life's alone"
    fleet.took(("d0", 3), text("d0", 10, stop=1))
    assert total(fleet.page(OWN)) == 1 + 5 + 2 + 1 + 11


def test_a_family_that_a_new_life_does_not_have_yet_stays() -> None:
    fleet = Federation()
    fleet.took(("d0", 1), text("d0", 5))
    fleet.took(("d0", 2), f'{GAUGE}running{{engine="d0"}} 1.0\n')
    assert total(fleet.page(OWN)) == 6


def test_a_late_page_of_a_former_life_changes_nothing() -> None:
    fleet = Federation()
    fleet.took(("d0", 1), text("d0", 5))
    fleet.took(("d0", 2), text("d0", 1))
    fleet.took(("d0", 1), text("d0", 6))
    assert total(fleet.page(OWN)) == 7


def test_a_new_life_whose_page_has_not_come_leaves_the_old_one_frozen() -> None:
    fleet = Federation()
    fleet.took(("d0", 1), text("d0", 5))
    fleet.living([("d0", 2)], 10)
    assert (total(fleet.page(OWN)), running(fleet.page(OWN))) == (6, [])


@given(
    st.lists(
        st.tuples(st.sampled_from(["d0", "d1", "p0"]), st.sampled_from(["work", "die", "rise", "late"])), max_size=40
    )
)
def test_no_sum_falls_whatever_dies_and_comes_back(happenings: list[tuple[str, str]]) -> None:
    fleet, now, last = Federation(), 0.0, 0.0
    lives: dict[str, Life] = {}
    counted: dict[str, int] = {}
    for name, what in happenings:
        now += 1
        life = lives.get(name)
        if what == "rise" and life is None:
            lives[name] = (name, round(now))
            counted[name] = 0
        elif what == "work" and life is not None:
            counted[name] += 3
            fleet.took(life, text(name, counted[name]))
        elif what == "die":
            lives.pop(name, None)
        elif what == "late" and life is not None:
            fleet.took(life, text(name, counted[name]))
        fleet.living(lives.values(), now)
        page = fleet.page(OWN)
        assert total(page) >= last
        last = total(page)
        assert len(running(page)) <= len(lives)
