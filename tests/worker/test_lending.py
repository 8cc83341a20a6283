"""Which cores a worker's next step may use, and that a page tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.errors import ConfigError
from splitserve.worker.lending import CALM_NS, STEP_NS, Cores, Lender, Lending, cores_to_use, make_page

ROWS = st.lists(st.integers(0, 20), min_size=1, max_size=6)


@given(ROWS, st.integers(0, 20), st.integers(0, 6))
def test_no_core_goes_to_two_workers_and_none_lies_idle_beside_a_busy_decode_worker(
    rows: list[int], now: int, lenders: int
) -> None:
    cores = tuple((2 * n, 2 * n + 1) for n in range(len(rows)))
    busy = [n for n, until in enumerate(rows) if until > now]
    use = {n: cores_to_use(rows, Lending(Path("page"), n, lenders, cores), now) for n in busy}
    used = [core for each in use.values() for core in each]
    assert len(used) == len(set(used))
    assert all(set(cores[n]) <= set(use[n]) for n in busy)
    assert all(use[n] == cores[n] for n in busy if n < lenders)
    if any(n >= lenders for n in busy):
        assert set(used) == set(range(2 * len(rows)))


def test_a_lending_survives_its_text() -> None:
    lending = Lending(Path("/run/a@b/page"), 1, 1, ((0, 1), (2,)))
    assert Lending.parse(lending.text()) == lending


@pytest.mark.parametrize("text", ["", "x/0/0/1@/page", "0/y/0/1@/page", "0/0/0,a@/page"])
def test_a_lending_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="SPLITSERVE_LENDING"):
        Lending.parse(text)


class Pair:
    """A prefill and a decode worker, a core each, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.now = 1
        self.used: list[list[Cores]] = [[], []]
        make_page(folder / "page", 2)
        self.prefill, self.decode = (
            Lender(Lending(folder / "page", n, 1, ((0,), (1,))), self.used[n].append, lambda: self.now) for n in (0, 1)
        )


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_a_borrower_gives_back_at_its_first_step_after_the_owner_has_work(pair: Pair) -> None:
    pair.decode.before_step()
    pair.decode.after_step()
    pair.decode.before_step()
    assert pair.used[1] == [(1, 0)]
    pair.prefill.before_step()
    pair.decode.after_step()
    pair.decode.before_step()
    assert pair.used[1] == [(1, 0), (1,)]


def test_a_prefill_worker_never_borrows(pair: Pair) -> None:
    pair.prefill.before_step()
    assert pair.used[0] == [(0,)]


def test_a_core_is_lent_only_after_a_calm(pair: Pair) -> None:
    pair.prefill.before_step()
    pair.prefill.after_step()
    pair.now += CALM_NS - 1
    pair.decode.before_step()
    assert pair.used[1] == [(1,)]
    pair.now += 1
    pair.decode.before_step()
    assert pair.used[1] == [(1,), (1, 0)]


def test_a_worker_that_was_killed_in_a_step_does_not_stay_busy(pair: Pair) -> None:
    pair.prefill.before_step()
    pair.now += STEP_NS
    pair.decode.before_step()
    assert pair.used[1] == [(1, 0)]


_PROBE = """
import os, torch
from splitserve.worker.engine_cores import EngineCores
torch.set_num_threads(1)
cpus = tuple(sorted(os.sched_getaffinity(0)))[:2]
engine = EngineCores(cpus[:1])
def masks(): return sorted(tuple(sorted(os.sched_getaffinity(int(t)))) for t in os.listdir("/proc/self/task"))
assert set(masks()) == {cpus[:1]}, masks()
for turn in range(3):
    engine.use(cpus)
    assert torch.get_num_threads() == 2
    assert masks().count(cpus[1:]) == 1, masks()
    engine.use(cpus[:1])
    assert torch.get_num_threads() == 1
    assert set(masks()) == {cpus[:1]}, masks()
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="two processors, Linux")
def test_openmp_threads_go_where_the_engine_goes_and_come_back() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _PROBE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
