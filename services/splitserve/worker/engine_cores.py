"""Where a worker computes, changed while it runs."""

from __future__ import annotations

import os
from itertools import zip_longest

import torch

from splitserve.worker.lending import Cores

_GRAIN = 1 << 15  # elements that torch gives a thread at least


class EngineCores:
    """Threads and affinity (Linux) of the thread that calls `use`, and of the OpenMP threads that it starts.

    `own`: where all threads of this process run, from now on. A process that lends and borrows is not pinned before it has
    loaded torch: OpenMP takes the processors that it finds then for all there are, and its threads sleep at every barrier
    once they are more than those.
    """

    def __init__(self, own: Cores) -> None:
        self._own = own
        self._team: list[int] = []  # the OpenMP threads beside the caller's own, in the order in which a step uses them
        for thread in _threads():
            os.sched_setaffinity(thread, own)

    def use(self, cores: Cores) -> None:
        """Compute on `cores`, a thread each; our own stand first."""
        before = _threads()
        torch.set_num_threads(len(cores))
        torch.zeros(len(cores) * _GRAIN).add_(1)  # work for every thread, so that new ones start here and are known
        now = _threads()
        self._team = [thread for thread in self._team if thread in now] + sorted(now - before)
        for thread, core in zip_longest(self._team[len(self._own) - 1 :], cores[len(self._own) :]):
            if thread is not None:
                os.sched_setaffinity(thread, self._own if core is None else {core})


def _threads() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))
