"""What the hand-over from prefill to decode costs: the stages between a prompt's first token and decode's first step.

    python benchmarks/handover.py --model FOLDER [--transports shm tcp] [--rounds 3] [--requests 24] [--tokens 256]

`splitserve serve --split always`, one transport at a time, in an order that rotates. Each is asked one request at a time
(light), then 16 at a time (saturated); an answer tells its own stages (docs/metrics.md). `hand-over` is the first gap less
decode's first step: all that passed between the two tokens but computing. `bytes aside` is it less `transfer`, the copy that
decode waited for: the bar is for its median under light load. Under a saturated one `gap_other` holds the rest of the step that
the batch was in when the KV came: the engine hears of it between steps.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import asking, peers
from bench.processes import stop_on_sigterm
from support.servers import free_port

BAR_MS = 5.0
LOADS = {"light": (1, 8), "saturated": (16, 64)}  # requests at a time, tokens an answer
STAGES = ("handle", "transfer", "decode_queue", "gap_other")
ROWS = (*STAGES, "hand-over", "bytes aside", "first_step")

Found = dict[str, list[float]]  # row of the table -> milliseconds, one a request


def main() -> int:
    given = _parse()
    stop_on_sigterm()
    found: dict[tuple[str, str], Found] = {(t, load): {} for t in given.transports for load in LOADS}
    moved: dict[str, list[float]] = {transport: [] for transport in given.transports}
    for number in range(given.rounds):
        first = number % len(given.transports)
        for transport in given.transports[first:] + given.transports[:first]:
            moved[transport].append(_round(given, transport, found))
    missed = 0
    for (transport, load), rows in found.items():
        at_a_time, answer = LOADS[load]
        size = sum(moved[transport]) / len(moved[transport]) / 2**20
        asked = f"{len(rows['hand-over'])} prompts of {given.tokens} tokens, {size:.2f} MiB moved a prompt"
        print(f"\n{transport}, {load}: {at_a_time} at a time, {answer} tokens an answer; {asked}")
        for line in table(rows):
            print(line)
        if load == "light":
            met = percentile(rows["bytes aside"], 50) < BAR_MS
            missed += not met
            print(f"bytes aside, p50: bar {BAR_MS:g} ms: {'met' if met else 'missed'}")
    return int(missed > 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--transports", nargs="+", choices=["shm", "tcp", "nixl"], default=["shm", "tcp"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=24, help="in a round, under each load")
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt")
    parser.add_argument("--flags", default="", help="more flags for splitserve serve")
    return parser.parse_args()


def _round(given: argparse.Namespace, transport: str, found: Mapping[tuple[str, str], Found]) -> float:
    """Ask one cluster under both loads; the bytes that were moved for a prompt."""
    flags = ["--split", "always", "--kv-transport", transport, *given.flags.split()]
    rng = random.Random()
    with peers.splitserve(given.model, free_port(), flags) as served:
        asking.ask(served.url, asking.prompts(rng, 8, given.tokens), 8, 4)
        before, asked = _moved_bytes(served.url, transport), 0
        for load, (at_a_time, answer) in LOADS.items():
            count = max(given.requests, 2 * at_a_time)
            answers = asking.ask(served.url, asking.prompts(rng, count, given.tokens), answer, at_a_time)
            asked += count
            for each in answers:
                for row, milliseconds in rows_of(each["usage"]["stage_seconds"]).items():
                    found[transport, load].setdefault(row, []).append(milliseconds)
        return (_moved_bytes(served.url, transport) - before) / asked


def _moved_bytes(url: str, transport: str) -> float:
    """RuntimeError when nothing came over this transport: the figures would be another's."""
    name = "splitserve_kv_transfer_bytes_total"
    total = sum(value for labels, value in asking.samples(url, name) if labels["transport"] == transport)
    if not total:
        raise RuntimeError(f"nothing was moved over {transport}")
    return total


def rows_of(stages: Mapping[str, Any]) -> dict[str, float]:
    """One answer's milliseconds. RuntimeError for an answer whose KV was not moved."""
    if "first_gap" not in stages:
        raise RuntimeError("a prompt was read where it was answered: there was no hand-over")
    parts = {stage: 1e3 * float(stages[stage]) for stage in (*STAGES, "first_step")}
    whole = sum(parts[stage] for stage in STAGES)
    return parts | {"hand-over": whole, "bytes aside": whole - parts["transfer"]}


def percentile(values: Sequence[float], share: int) -> float:
    """The least value that `share` per cent of them do not exceed."""
    return sorted(values)[max(0, -(-len(values) * share // 100) - 1)]


def table(rows: Found) -> list[str]:
    """Milliseconds, the median and the ninth decile of each row."""
    lines = [f"{'':14}{'p50 ms':>10}{'p90 ms':>10}"]
    return lines + [f"{row:14}{percentile(rows[row], 50):10.2f}{percentile(rows[row], 90):10.2f}" for row in ROWS]


if __name__ == "__main__":
    sys.exit(main())
