"""The whole cluster under seeded faults, and proof that the simulator sees what it should."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest

from simulation.schedules import PROFILES, schedule_of
from simulation.sweep import run_single, single_faults
from simulation.world import run
from splitserve.engine import door, events
from splitserve.engine.sequence import Job, blocks_for
from splitserve.kv.pool import BlockPool
from splitserve.protocol.handle import GroupBlocks
from splitserve.router import placement
from splitserve.router.stages import Stages

SEEDS = 2000
FEW_SEEDS = 300  # of the fast part; too few to meet every row of the tables
Counts = Counter[tuple[str, str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Steps that are told to fail are logged with their traceback, thousands of times."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("base", range(4))
def test_a_fault_at_any_one_message_costs_no_answer(base: int) -> None:
    runs = 0
    for schedule in single_faults(base):
        result = run_single(schedule)
        assert result.violation is None, f"base {base}, {schedule.singles}: {result.violation}"
        runs += 1
    assert runs > 40


def test_prompts_that_wait_may_move_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """To whoever is free, sooner there or not: by the estimate alone a simulated cluster moves one in a thousand."""
    moved: list[float] = []
    monkeypatch.setattr(placement, "MOVE", inf)
    monkeypatch.setattr(Stages, "moved", lambda _self, now: moved.append(now))
    for seed in range(200):
        result = run(schedule_of(seed, "crawl"))
        assert result.violation is None, f"seed {seed}: {result.violation}"
    assert len(moved) > 10


MESSAGES = {
    "DecodeJob", "PrefillJob", "Amend", "Cancel", "Resume", "FinAck", "Ping", "Accepted", "Refused", "ResumeAnswer",
    "Pong", "ReleaseAnswer", "RenewAnswer", "Release", "Renew", "KvReady", "KvLoaded", "KvFailed", "TokenFrame",
    "Preempted", "Digest", "Beat",
}  # fmt: skip
MOVES = {  # of the request table
    "(new) + Submit -> queued",
    "queued + decode Accepted -> queued",  # await: prefill is asked next
    "queued + decode Accepted -> prefilling",  # local
    "prefilling + TokenFrame -> decoding",  # the same
    "queued + prefill Accepted -> prefilling",
    "queued + KvReady -> prefilling",  # it is the lost answer too
    "queued + TokenFrame -> decoding",
    "prefilling + KvReady -> transferring",
    "prefilling + amend Accepted -> prefilling",  # prefill lost
    "transferring + KvLoaded -> decoding",
    "transferring + TokenFrame -> decoding",
    "transferring + KvFailed -> prefilling",
    "transferring + decode Accepted -> transferring",  # decode lost: the same handle goes to another
    "transferring + KvReady -> finished",  # the first token ends it
    "decoding + Beat -> prefilling",  # decode lost
    "decoding + Tick -> prefilling",
    "decoding + Preempted -> prefilling",
    "decoding + TokenFrame -> finished",
    "decoding + Stop -> finished",
    "decoding + Leave -> cancelled",
    "queued + Leave -> cancelled",
    "decoding + Tick -> failed",  # its deadline
    "queued + decode Refused -> failed",
}
STRUCK = {  # of the failure table: what happened to whom, and in which state a request of it was
    (f"failure: {fate}", f"{role} | {state}")
    for fate in ("kill", "freeze", "partition")
    for role, states in (
        ("prefill", ("prefilling", "transferring")),
        ("decode", ("prefilling", "transferring", "decoding")),
        ("router", ("queued", "prefilling", "decoding")),
    )
    for state in states
}


def counts_of(seeds: range) -> Counts:
    """What the journals of these runs counted. AssertionError for a run that breaks an invariant."""
    counts: Counts = Counter()
    for seed in seeds:
        result = run(schedule_of(seed))
        assert result.violation is None, f"make simulate SEED={seed}: {result.violation}"
        counts.update(result.journal.counts)
    return counts


@pytest.fixture(scope="module")
def few_seeds() -> Counts:
    """Of the first seeds, which are played once for both tests."""
    logging.disable()
    return counts_of(range(FEW_SEEDS))


def test_no_seed_of_a_few_breaks_an_invariant(few_seeds: Counts) -> None:
    assert few_seeds["requests", "finished"] > FEW_SEEDS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_seed_breaks_an_invariant_and_together_they_meet_every_row_of_the_tables(few_seeds: Counts) -> None:
    counts = few_seeds + counts_of(range(FEW_SEEDS, SEEDS))
    wanted = STRUCK | {("message", row) for row in MESSAGES} | {("request table", row) for row in MOVES}
    wanted |= {("requests", row) for row in ("finished", "left", "DeadlineExceeded")}
    assert wanted - set(counts) == set()


def test_a_block_that_others_may_read_before_it_is_full_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(job: Job, pool: BlockPool, block_tokens: int) -> door.Progress:
        told = job.prompt.tables[0][: blocks_for(job.prompt.computed, block_tokens)]
        groups = (GroupBlocks(0, tuple(told), pool.generations(told)),)
        return door.Progress(job.key, job.prompt.computed, groups, "")

    monkeypatch.setattr(events, "progress", careless)
    results = (run(schedule_of(seed, "crawl")) for seed in range(20))
    rules = [result.violation.rule for result in results if result.violation is not None]
    assert "what_is_readable_does_not_change" in rules


@pytest.fixture(scope="module")
def logs() -> list[dict[str, list[str]]]:
    """The journal of one run of each profile, by two processes that hash strings differently."""
    code = (
        "import json, logging, sys; logging.disable()\n"
        "from simulation.schedules import PROFILES, schedule_of\n"
        "from simulation.world import run\n"
        "json.dump({p: run(schedule_of(77, p), keep=True).journal.lines for p in PROFILES}, sys.stdout)"
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("services", "shared", "tests"))
    said = (
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": path, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    )
    return [json.loads(text) for text in said]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_seed_is_one_run_whatever_python_hashes_strings_to(logs: list[dict[str, list[str]]], profile: str) -> None:
    one, other = (log[profile] for log in logs)
    assert len("\n".join(one)) > 1000
    assert one == other
