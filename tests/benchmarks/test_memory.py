"""What is read of processes' memory, and what is said of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from memory import Pool, Resident, growth, mapped

SHARED = """\
7f0000000000-7f0010000000 rw-s 00000000 00:01 2054   /memfd:splitserve-kv (deleted)
Rss:              262144 kB
VmFlags: rd wr sh mr mw me ms sd
7f0020000000-7f0030000000 r--s 00000000 00:01 2055   /memfd:splitserve-kv (deleted)
VmFlags: rd mr me ms sd
"""
PRIVATE = """\
7f0040000000-7f0048000000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me dc ac sd hg
7f0050000000-7f0060000000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me ac sd hg
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_process_knows_what_it_holds() -> None:
    now = Resident.of(Path(f"/proc/{os.getpid()}/status").read_text())
    assert 0 < now.anonymous < now.rss


@pytest.mark.parametrize(("smaps", "size"), [(SHARED, 1 << 28), (PRIVATE, 1 << 27)])
def test_a_worker_maps_its_own_pool_writable_and_others_to_read(smaps: str, size: int) -> None:
    assert mapped(smaps.splitlines()) == size


@pytest.mark.parametrize(
    ("asked", "over", "exact"),
    [(1000, 0, True), (1099, 4096, True), (1100, 0, False), (999, 0, False), (1000, 1 << 20, False)],
)
def test_a_pool_is_as_sized_when_no_block_more_would_fit(asked: int, over: int, exact: bool) -> None:
    pool = Pool("prefill-0", asked, blocks=10, size=1000, mapped=1000 + over)
    assert pool.exact is exact
    assert str(pool).endswith("met" if exact else "missed")


def test_growth_is_told_from_the_first_requests_on() -> None:
    steps = [
        {role: Resident(200.0, mib) for role in ("router", "prefill", "decode")} for mib in (10.0, 50.0, 51.0, 52.5)
    ]
    assert growth(steps).endswith("router +2.5, prefill +2.5, decode +2.5")
