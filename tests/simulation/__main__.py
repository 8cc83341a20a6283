"""`make simulate SEEDS=100000`: run seeds, print how often each thing happened, and the event log of a seed that fails."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from simulation.faults import MessageFault, SingleFault
from simulation.journal import table
from simulation.plan import Schedule
from simulation.schedules import PROFILES, schedule_of
from simulation.sweep import BASES, FIRST_BASE, base_schedule, run_single, single_faults
from simulation.world import Result, run

LOG_LINES = 400  # of a failing seed, the last ones
PROGRESS = 1000  # runs between two lines that say how far it is


def main(words: Sequence[str] | None = None) -> int:
    """0 when no invariant broke."""
    args = _arguments(words)
    logging.disable()  # steps that are told to fail would say so
    if args.replay is not None:
        return _replay(args)
    began = time.process_time()
    counts: Counter[tuple[str, str]] = Counter()
    failed: list[Result] = []
    runs = 0
    for schedule, result in _runs(args):
        runs += 1
        counts.update(result.journal.counts)
        if runs % PROGRESS == 0:
            print(f"{runs:,} runs, {len(failed)} broke an invariant", file=sys.stderr)
        if result.violation is not None:
            failed.append(result)
            print(f"seed {schedule.seed} ({schedule.profile}): {result.violation}\n  {_replay_line(schedule, args)}")
            if len(failed) >= args.stop_after:
                break
        if args.seconds and time.process_time() - began > args.seconds:
            break
    seconds = time.process_time() - began
    print(table(counts))
    print(
        f"{runs:,} runs in {seconds:.1f} s of CPU, {seconds / max(1, runs) * 1e3:.1f} ms each; {len(failed)} broke an invariant"
    )
    if failed:
        _show(failed[0].schedule)
    return 1 if failed else 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--profile", choices=sorted(PROFILES), help="all seeds in this profile")
    parser.add_argument("--singles", action="store_true", help="also one fault at each message of fault-free runs")
    parser.add_argument("--off", default="", help="safety rules to switch off, comma-separated: router.guard_da, …")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so many seconds of CPU")
    parser.add_argument("--stop-after", type=int, default=5, help="stop after so many failures")
    parser.add_argument("--replay", type=int, help="run one seed and print its events")
    parser.add_argument("--base", action="store_true", help="--replay names a fault-free base, not a seed")
    parser.add_argument("--single", default="", help="with --replay: the one fault, as 17:drop")
    return parser.parse_args(words)


def _off(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(filter(None, args.off.split(",")))


def _runs(args: argparse.Namespace) -> Iterator[tuple[Schedule, Result]]:
    if args.singles:
        for number in range(BASES):
            for schedule in single_faults(number):
                yield schedule, run_single(replace(schedule, switched_off=_off(args)))
    for seed in range(args.first, args.first + args.seeds):
        schedule = replace(schedule_of(seed, args.profile), switched_off=_off(args))
        yield schedule, run(schedule)


def _replay_line(schedule: Schedule, args: argparse.Namespace) -> str:
    """The command that plays this very run again."""
    seed, words = schedule.seed, list[str]()
    if seed >= FIRST_BASE:
        seed -= FIRST_BASE
        words = ["--base", *(f"--single {single.number}:{single.fault}" for single in schedule.singles)]
    elif args.profile:
        words = ["--profile", args.profile]
    if args.off:
        words += ["--off", args.off]
    return f"make simulate SEED={seed}" + (f' ARGS="{" ".join(words)}"' if words else "")


def _replay(args: argparse.Namespace) -> int:
    schedule = base_schedule(args.replay) if args.base else schedule_of(args.replay, args.profile)
    if args.single:
        number, _, fault = args.single.partition(":")
        schedule = replace(schedule, singles=(SingleFault(int(number), MessageFault(fault)),))
    return _show(replace(schedule, switched_off=_off(args)))


def _show(schedule: Schedule) -> int:
    """Run it once more, with its events."""
    result = run(schedule, keep=True)
    print(f"\nseed {schedule.seed} ({schedule.profile}), {schedule.cluster}\n{schedule.network}")
    for item in (*schedule.clients, *schedule.events):
        print(f"  {item}")
    print("\n".join(result.journal.lines[-LOG_LINES:]))
    print(result.violation or "no invariant broke")
    return 1 if result.violation is not None else 0


if __name__ == "__main__":
    sys.exit(main())
