"""Bounds on what waits."""

from __future__ import annotations

from splitserve.config import RoutingSettings
from splitserve.router.admission import Waiting, refusal

SETTINGS = RoutingSettings(max_queued_tokens=1000, max_waiting_requests=10)


def test_within_both_bounds_everybody_comes_in():
    assert refusal(SETTINGS, Waiting(9, 900), 100, 500.0) is None


def test_too_many_requests_are_refused_with_both_numbers_and_a_time_to_come_back():
    error = refusal(SETTINGS, Waiting(10, 900), 1, 100.0)
    assert error is not None
    assert "10 requests wait" in error.message
    assert error.retry_after_s == 9.0


def test_too_many_tokens_are_refused_with_every_number():
    error = refusal(SETTINGS, Waiting(2, 900), 101, 1e9)
    assert error is not None
    assert "900 prompt tokens wait" in error.message
    assert "101" in error.message
    assert error.retry_after_s == 1.0


def test_a_prompt_over_the_whole_bound_comes_in_when_nothing_waits():
    assert refusal(SETTINGS, Waiting(0, 0), 5000, 100.0) is None
