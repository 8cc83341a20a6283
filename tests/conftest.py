"""Fixtures of the whole suite, each of which lives in `support`; what goes for every test."""

from __future__ import annotations

import gc

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["support.servers", "support.models", "support.leaks"]


def pytest_configure() -> None:
    """No example is too slow: a busy machine would fail what is right, and no timing is asserted here."""
    settings.register_profile("any_speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any_speed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` a file's tests stay in one process, and share its fixtures; all clusters are of one process,
    so that no two of them share the processors."""
    for item in items:
        group = "clusters" if item.get_closest_marker("e2e") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """What the collected modules brought stays: later full collections, of which the tests for leaks want many, look
    through what tests made, in milliseconds, and not through all of torch, in most of a second."""
    gc.collect()
    gc.freeze()
