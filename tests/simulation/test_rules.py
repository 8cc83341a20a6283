"""No rule is there for nothing: without it some run breaks an invariant, or costs more than with it.

It also keeps the simulator honest: one that finds nothing without a rule proves nothing with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from simulation.focuses import FOCUSES
from simulation.hunt import harm
from simulation.world import all_rules, run

pytestmark = pytest.mark.slow  # all together: tens of seconds


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_each_rule_with_a_switch_has_runs_in_which_it_has_work_to_do() -> None:
    assert set(FOCUSES) == set(all_rules())


@pytest.mark.parametrize("rule", FOCUSES)
def test_without_the_rule_a_run_breaks_or_costs_more(rule: str) -> None:
    assert harm(rule, FOCUSES[rule]) is not None, f"{rule}: no harm in {FOCUSES[rule].seeds} runs without it"


@pytest.mark.parametrize("rule", FOCUSES)
def test_with_all_rules_the_same_runs_are_whole(rule: str) -> None:
    for number, schedule in enumerate(FOCUSES[rule].schedules()):
        if number == 20:
            break
        result = run(schedule)
        assert result.violation is None, f"{schedule}: {result.violation}"
