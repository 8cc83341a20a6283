"""docs/benchmarks.md, from what was measured. Nothing in it is written by hand but the words about it.

What was measured here takes the place of what stood there; what was not stays as it came, with its own machine and commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.parts import PARTS
from bench.results import ROOT, Spread, load, ratios
from bench.workloads import RATES, WORKLOADS, workload_of

PAGE = ROOT / "docs" / "benchmarks.md"
_HEAD = """# Benchmarks

Written by `make bench` from what it measured: `make bench PART=serving` runs one part, `PART=page` writes this page again.
Each part names its machine, its day, its commit and the command that makes it again. Figures are medians, with the least and
the greatest of the repeats in brackets; ratios are taken round by round. A figure that misses its bar stays here.
"""
_NAMES = {"splitserve": "splitserve", "vllm": "vLLM", "pair": "vLLM's pair", "llama": "llama.cpp"}


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure's ratio to a peer's should be: at least, or at most where less is better."""

    peer: str
    ratio: float
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        return ratio <= self.ratio if self.at_most else ratio >= self.ratio


_REQUESTS = "requests a second"
_BARS: Mapping[tuple[str, str], Sequence[Bar]] = {
    ("256/64 c=16", _REQUESTS): (Bar("vllm", 1.5), Bar("pair", 4.5)),
    ("1024/64 c=8", _REQUESTS): (Bar("vllm", 1.6), Bar("pair", 5.0)),
    ("256/64 c=16", "p99 inter-token latency, ms"): (Bar("vllm", 0.25, at_most=True),),
    ("1024/64 c=8", "p99 inter-token latency, ms"): (Bar("vllm", 0.25, at_most=True),),
    ("256/64 c=1", "TPOT, ms"): (Bar("vllm", 0.6, at_most=True), Bar("llama", 1.0, at_most=True)),
    ("256/64 c=1", "TTFT, ms"): (Bar("vllm", 1.0, at_most=True),),
    ("256/64 goodput", _REQUESTS): (Bar("vllm", 1.7),),
    ("1024/64 goodput", _REQUESTS): (Bar("vllm", 2.0),),
}
_PREFIX_BAR = 0.15  # of our own cold TTFT


def write() -> None:
    """The page, with every part that was ever measured here. Where none was, the page stays as it came."""
    if measured := {name: kept for name in PARTS if (kept := load(name)) is not None}:
        PAGE.write_text(text(measured, PAGE.read_text() if PAGE.exists() else ""))


def text(kept: Mapping[str, Mapping[str, Any]], before: str = "") -> str:
    """The page of `kept`: part -> what `results.write` kept; the parts and workloads that it lacks as they are in `before`."""
    had = _sections("## ", before)
    lines = [_HEAD]
    for name, part in PARTS.items():
        result, stood = kept.get(name), had.get(part.title)
        if result is None:
            lines += [] if stood is None else [f"## {part.title}", *stood]
            continue
        lines += [f"## {part.title}", "", part.about, ""]
        if "workloads" in result:
            tables = _sections("### ", "\n".join(stood or ())) | serving(result["workloads"])
            for workload, table in tables.items():
                lines += [f"### {workload}", *table]
        else:
            lines += [_made(result), "", "```", result["printed"].rstrip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _sections(mark: str, page: str) -> dict[str, list[str]]:
    """The lines under each heading that begins with `mark`, ended by an empty one."""
    sections: dict[str, list[str]] = {}
    fenced = False
    lines: list[str] = []
    for line in page.splitlines():
        fenced ^= line == "```"
        if line.startswith(mark) and not fenced:
            lines = sections[line.removeprefix(mark)] = []
        else:
            lines.append(line)
    return {title: [*"\n".join(lines).rstrip().split("\n"), ""] for title, lines in sections.items()}


def _made(result: Mapping[str, Any]) -> str:
    m = result["machine"]
    instructions = ", ".join(m["instructions"])
    return (
        f"`{result['command']}`, {result['when']}, commit {result['commit']}, {m['cores']} cores of {m['cpu']} "
        f"({instructions}), {m['memory_gib']} GiB, Python {m['python']}."
    )


def serving(workloads: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Under each workload's name its table, what is said of the bars, and how it was made."""
    sections: dict[str, list[str]] = {}
    for workload, kept in workloads.items():
        table, idle, rounds = kept["figures"], kept["idle_percent"], kept["rounds"]
        systems = [system for system in _NAMES if system in idle]
        names = " | ".join(_NAMES[system] for system in systems)
        lines = [
            "",
            f"| | {names} | ratio to each, and its bar |",
            "|" + "---|" * (len(systems) + 2),
        ]
        for figure, values in table.items():
            cells = " | ".join(str(Spread.of(values[system])) for system in systems)
            lines.append(f"| {figure} | {cells} | {_compared(workload, figure, values)} |")
        if "repeated TTFT, ms" in table and "splitserve" in systems:
            share = ratios(table["repeated TTFT, ms"]["splitserve"], table["cold TTFT, ms"]["splitserve"])
            said = f"{share}; the bar is {_PREFIX_BAR}: {_verdict(share.median <= _PREFIX_BAR)}."
            lines += ["", f"Repeated to cold, ours: {said}"]
        burned = ", ".join(f"{_NAMES[system]} {Spread.of(idle[system]).median:.0f} %" for system in systems)
        lines += ["", f"{rounds} round{'s' * (rounds > 1)}. Idle, of one core: {burned}. {_made(kept)}", ""]
        sections[workload] = lines
    return sections


def _compared(workload: str, figure: str, values: Mapping[str, Sequence[float]]) -> str:
    parts: list[str] = []
    name = workload_of(workload)
    bars = {bar.peer: bar for bar in _BARS.get((name, figure), ())}
    for peer, theirs in values.items():
        if peer == "splitserve" or "splitserve" not in values or not (all(theirs) or WORKLOADS[name].search):
            continue
        # a goodput below the lowest rate that was tried is taken for that rate
        ratio = ratios(values["splitserve"], [value or RATES[0] for value in theirs])
        said = f"{_NAMES[peer]} {'' if all(theirs) else 'at least '}{ratio}"
        if (bar := bars.get(peer)) is not None:
            said += f", bar {'at most' if bar.at_most else 'at least'} {bar.ratio:g}: {_verdict(bar.met(ratio.median))}"
        parts.append(said)
    return "; ".join(parts)


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"
