from __future__ import annotations

import pytest

from splitserve.errors import ModelUnavailable, NeverReady, NotEnoughMemory, UnsupportedModel
from splitserve.serve.policy import ChildPolicy, GiveUp, Kill, Phase, Rules, Start, how_it_ended

RULES = Rules(start_s=100, stuck_s=30, first_pause_s=1, longest_pause_s=8, calm_s=60, failed_starts=3)


def child() -> ChildPolicy:
    policy = ChildPolicy("prefill-0", RULES)
    assert policy.tick(0) == [Start()]
    policy.started(0)
    return policy


def ready_child() -> ChildPolicy:
    policy = child()
    assert policy.ready(1)
    return policy


def test_readiness_is_news_once_a_life() -> None:
    policy = child()
    assert policy.ready(5)
    assert not policy.ready(6)
    assert policy.phase is Phase.READY


def test_a_ready_child_that_exits_is_started_again_after_a_pause() -> None:
    policy = ready_child()
    assert policy.exited(10, -9, "") == []
    assert policy.tick(10.9) == []
    assert policy.tick(11) == [Start()]


def test_the_pause_doubles_up_to_a_limit_and_starts_anew_after_a_calm_time() -> None:
    policy = ready_child()
    now, pauses = 2.0, list[float]()
    for _ in range(6):
        policy.exited(now, 1, "")
        pauses.append(policy.restart_at - now)
        now = policy.restart_at
        policy.started(now)
        policy.ready(now)
    assert pauses == [1, 2, 4, 8, 8, 8]
    policy.exited(now + 60, 1, "")
    assert policy.restart_at - (now + 60) == 1


@pytest.mark.parametrize(("code", "error"), [(4, NotEnoughMemory), (5, ModelUnavailable), (6, UnsupportedModel)])
def test_a_start_failure_stops_everything_instead_of_looping(code: int, error: type[Exception]) -> None:
    (command,) = child().exited(1, code, "no room for 3 GiB")
    assert isinstance(command, GiveUp)
    assert type(command.error) is error
    assert command.error.message == "prefill-0 cannot start: no room for 3 GiB"


def test_a_child_that_was_ready_once_is_never_given_up() -> None:
    """The others serve; it would end them."""
    policy = ready_child()
    now = 10.0
    assert policy.exited(now, -9, "") == []
    for _ in range(2000):
        now = policy.restart_at
        assert policy.tick(now) == [Start()]
        policy.started(now)
        assert policy.exited(now + 1, 8, "NATS did not answer") == []
    assert policy.restart_at - (now + 1) == RULES.longest_pause_s


def test_a_child_that_never_becomes_ready_is_given_up_after_its_tries() -> None:
    policy = child()
    for now in (1, 3):
        assert policy.exited(now, 1, "Traceback") == []
        policy.started(now + 1)
    (command,) = policy.exited(6, -9, "")
    assert isinstance(command, GiveUp)
    assert isinstance(command.error, NeverReady)
    assert "3 starts" in command.error.message
    assert "SIGKILL (out of memory?)" in command.error.message


def test_a_child_that_is_not_ready_in_time_at_first_is_given_up() -> None:
    policy = child()
    assert policy.tick(100) == []
    (command,) = policy.tick(101)
    assert isinstance(command, GiveUp)
    assert isinstance(command.error, NeverReady)
    assert command.error.message.startswith("prefill-0 was not ready in 100 s")


def test_a_restarted_child_that_is_not_ready_in_time_is_killed_once() -> None:
    policy = ready_child()
    policy.exited(10, -9, "")
    policy.started(11)
    (command,) = policy.tick(112)
    assert isinstance(command, Kill)
    assert "100 s" in command.reason
    assert policy.tick(113) == []


def test_a_stuck_step_is_killed_once_and_a_long_one_is_not() -> None:
    policy = ready_child()
    assert policy.step_age(29.9) == []
    (command,) = policy.step_age(31)
    assert isinstance(command, Kill)
    assert "31 s" in command.reason
    assert policy.step_age(32) == []
    policy.exited(50, -9, "")
    policy.started(51)
    assert policy.step_age(31) != []


def test_exit_codes_and_signals_are_told_in_words() -> None:
    assert how_it_ended(3) == "ended with exit code 3"
    assert how_it_ended(-15) == "was killed by SIGTERM"
    assert how_it_ended(-200) == "was killed by signal 200"
