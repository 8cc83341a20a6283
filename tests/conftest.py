"""Fixtures of the whole suite, each of which lives in `support`; what goes for every test."""

from __future__ import annotations

import gc

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

pytest_plugins = ["support.servers", "support.models", "support.leaks"]
CLUSTERS = "tests/e2e/"


def pytest_configure() -> None:
    """No example is too slow: a busy machine would fail what is right, and no timing is asserted here."""
    settings.register_profile("any_speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any_speed")


class OneForClusters(LoadFileScheduling):
    """A file's tests stay in one process and share its fixtures; all clusters are of one process, so that no two of them
    share the processors."""

    def _split_scope(self, nodeid: str) -> str:
        return CLUSTERS if nodeid.startswith(CLUSTERS) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneForClusters:
    return OneForClusters(config, log)


def pytest_collection_finish() -> None:
    """What the collected modules brought stays: later full collections, of which the tests for leaks want many, look
    through what tests made, in milliseconds, and not through all of torch, in most of a second."""
    gc.collect()
    gc.freeze()
