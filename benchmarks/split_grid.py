"""Is `--split auto` never worse than the better of always and never? A grid of prompt lengths and loads.

    python benchmarks/split_grid.py --model FOLDER [--rounds 5] [--prompts 32 256 1024] [--loads 1 4 16] [--output 32]

In a round three clusters stand side by side, one a way, started anew, lest what one of them has by chance be taken for its
way's. A cell asks them in turn with the same prompts, in an order that rotates; what the idle ones burn is printed. So many
clients at a time ask again as soon as they are answered: requests a second are then their number over the mean time of an
answer, and one figure tells both.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import load, peers
from bench.load import Load
from bench.processes import busy_percent, stop_on_sigterm
from bench.results import Spread, ratios
from bench.side_by_side import side_by_side
from bench.workloads import seed_of

WAYS = ("auto", "always", "never")
BOUND = 1.05  # of the better way's time
_FEWEST, _A_CLIENT = 6, 3  # requests of a run
_IDLE_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--flags", default="", help="more flags for splitserve serve")
    given = parser.parse_args()
    stop_on_sigterm()
    peers.set_up()
    cells = list(itertools.product(given.prompts, given.loads))
    found: dict[tuple[int, int], dict[str, list[float]]] = {cell: {way: [] for way in WAYS} for cell in cells}
    idle: list[float] = []
    base = random.randrange(1 << 30)
    for number in range(given.rounds):
        ways = (*WAYS[number % 3 :], *WAYS[: number % 3])
        flags = {way: ["--split", way, *given.flags.split()] for way in ways}
        with side_by_side(given.model, flags) as served:
            idle.append(busy_percent([root for each in served.values() for root in each.roots], _IDLE_S))
            for cell in cells:
                prompt, clients = cell
                asked = Load(prompt, given.output, max(_FEWEST, _A_CLIENT * clients), clients)
                for way in ways:
                    result = load.run(served[way].url, given.model, asked, seed_of(base, number, cell))
                    found[cell][way].append(float(result["mean_e2el_ms"]))
    print(f"all three idle, % of a core: {Spread.of(idle)}")
    print(table(found, given.output))


def table(found: Mapping[tuple[int, int], Mapping[str, Sequence[float]]], output: int) -> str:
    """(prompt tokens, clients) -> way -> mean milliseconds of an answer, a value a round."""
    lines = [
        f"mean ms of an answer of {output} tokens; ratios round by round",
        f"{'prompt':>6} {'clients':>7}  {'always':24} {'never':24} {'auto':24} {'split pays':>10}  auto to the better",
    ]
    for (prompt, clients), times in found.items():
        shown = "".join(f"{Spread.of(times[way])!s:25}" for way in ("always", "never", "auto"))
        pays = ratios(times["never"], times["always"]).median
        better = min(("always", "never"), key=lambda way: Spread.of(times[way]).median)
        ratio = ratios(times["auto"], times[better])
        said = "" if ratio.median <= BOUND else f", over the bound of {BOUND:g}"
        lines.append(f"{prompt:6} {clients:7}  {shown}{pays:10.2f}  {ratio} ({better}){said}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
