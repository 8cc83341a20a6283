"""Fixtures of the whole suite, each of which lives in `support`; what goes for every test."""

from __future__ import annotations

import gc

from hypothesis import HealthCheck, settings

pytest_plugins = ["support.servers", "support.models", "support.leaks"]


def pytest_configure() -> None:
    """No example is too slow: a busy machine would fail what is right, and no timing is asserted here."""
    settings.register_profile("any_speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any_speed")


def pytest_collection_finish() -> None:
    """What the collected modules brought stays: later full collections, of which the tests for leaks want many, look
    through what tests made, in milliseconds, and not through all of torch, in most of a second."""
    gc.collect()
    gc.freeze()
