"""What it gives and costs that an idle prefill worker lends its cores to decode, and takes them back when a prompt comes.

    python benchmarks/lending.py --model FOLDER [--rounds 5]

`splitserve serve --split always` as it is, and with `--no-lend-cores`, side by side and started anew in each round. `alone`:
one stream at a time, so that decode has the prefill worker's cores at nearly every step. `arrivals`: prompts come at random
moments while others are answered, so that the cores pass to and fro all the time. A spike at that would show in the longest gaps
between two tokens, and the bar is for the last hundredth of them: with lending they are to be no longer than without.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import load, peers
from bench.load import Load
from bench.processes import stop_on_sigterm
from bench.results import Spread, ratios
from bench.side_by_side import side_by_side
from bench.workloads import seed_of

WAYS: Mapping[str, Sequence[str]] = {"lent": (), "kept": ("--no-lend-cores",)}
LOADS = {"alone": Load(256, 64, 8, 1), "arrivals": Load(256, 96, 30, rate=0.8)}
FIGURES: Mapping[tuple[str, str], Callable[[dict[str, Any]], float]] = {
    ("alone", "mean TPOT"): lambda result: float(result["mean_tpot_ms"]),
    ("arrivals", "p50 inter-token latency"): lambda result: float(result["p50_itl_ms"]),
    ("arrivals", "p99 inter-token latency"): lambda result: float(result["p99_itl_ms"]),
    ("arrivals", "longest gap"): lambda result: 1e3 * max(gap for answer in result["itls"] for gap in answer),
}
BARRED, BAR = ("arrivals", "p99 inter-token latency"), 1.0

Found = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]  # load and figure -> way -> milliseconds, one a round


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    stop_on_sigterm()
    peers.set_up()
    found: dict[tuple[str, str], dict[str, list[float]]] = {row: {way: [] for way in WAYS} for row in FIGURES}
    base = random.randrange(1 << 30)
    for number in range(given.rounds):
        ways = [*WAYS][:: 1 if number % 2 else -1]
        with side_by_side(given.model, {way: ["--split", "always", *WAYS[way]] for way in ways}) as served:
            for name, asked in LOADS.items():
                for way in ways:
                    result = load.run(served[way].url, given.model, asked, seed_of(base, number, name))
                    for (of, figure), read in FIGURES.items():
                        if of == name:
                            found[of, figure][way].append(read(result))
    lines, met = table(found)
    print("\n".join(lines))
    return int(not met)


def table(found: Found) -> tuple[list[str], bool]:
    """Its lines, and whether the bar was met."""
    met = True
    lines = [f"{'milliseconds':35}{'lent':25}{'kept':25}lent to kept"]
    for row, times in found.items():
        ratio, said = ratios(times["lent"], times["kept"]), ""
        if row == BARRED:
            met = ratio.median <= BAR
            said = f", bar {BAR:g}: {'met' if met else 'missed'}"
        name, figure = row
        lines.append(
            f"{f'{name}: {figure}':35}{Spread.of(times['lent'])!s:25}{Spread.of(times['kept'])!s:25}{ratio}{said}"
        )
    return lines, met


if __name__ == "__main__":
    sys.exit(main())
