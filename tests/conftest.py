"""Fixtures of the whole suite, each of which lives in `support`; what goes for every test."""

from __future__ import annotations

import ctypes
import gc
import sys

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

pytest_plugins = ["support.servers", "support.models", "support.leaks"]
CLUSTERS = "tests/e2e/"
LONG = (
    "tests/engine/test_generate.py",
    "tests/simulation/test_simulation.py",
    "tests/worker/test_service.py",
    "tests/model/test_embedded.py",
    "tests/compose/test_dashboards.py",
    "tests/browser/test_status_page.py",
    "tests/simulation/test_rules.py",
)
PR_SET_THP_DISABLE = 41


def pytest_configure() -> None:
    """No example is too slow: a busy machine would fail what is right, and no timing is asserted here."""
    settings.register_profile("any_speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any_speed")
    if sys.platform == "linux":
        # For all processes of the run: on a virtual machine that gives memory back, each new huge page costs 20 ms, thus
        # each start of a worker seconds; what is faster in them pays off after minutes of serving only.
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


class OneForClusters(LoadFileScheduling):
    """A file's tests stay in one process and share its fixtures; all clusters are of one process, so that no two of them
    share the processors. Long files begin first, that the processes end together."""

    def _split_scope(self, nodeid: str) -> str:
        return CLUSTERS if nodeid.startswith(CLUSTERS) else super()._split_scope(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        for scope in (CLUSTERS, *LONG):
            if scope in self.workqueue:
                self.workqueue.move_to_end(scope, last=False)
                break
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneForClusters:
    return OneForClusters(config, log)


def pytest_collection_finish() -> None:
    """What the collected modules brought stays: later full collections, of which the tests for leaks want many, look
    through what tests made, in milliseconds, and not through all of torch, in most of a second."""
    gc.collect()
    gc.freeze()
