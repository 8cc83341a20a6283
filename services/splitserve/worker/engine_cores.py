"""Where the engine's thread computes, changed while it runs."""

from __future__ import annotations

import os

import torch

from splitserve.worker.lending import Cores


class EngineCores:
    """Threads and affinity of the calling thread and of the OpenMP threads that it started."""

    def __init__(self) -> None:
        self._pool: set[int] = set()

    def use(self, cores: Cores) -> None:
        """Compute on `cores`, one thread each (Linux)."""
        for thread in (0, *(self._pool & _threads())):
            os.sched_setaffinity(thread, cores)
        before = _threads()
        torch.set_num_threads(len(cores))
        torch.zeros(1 << 18).add_(1)  # large enough for every thread, so that new ones start here and are known
        self._pool |= _threads() - before


def _threads() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))
