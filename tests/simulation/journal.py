"""What a run leaves behind: how often each thing happened, and, when asked for, every event in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

LONG = 300  # characters of one event's text that are kept


class Journal:
    """Counts by table and row; lines only if `keep`, for a failing seed is simply run again."""

    __slots__ = ("counts", "keep", "lines")

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.lines: list[str] = []
        self.counts: Counter[tuple[str, str]] = Counter()

    def count(self, table: str, row: str) -> None:
        self.counts[table, row] += 1

    def write(self, now: float, who: str, what: str, thing: object = "") -> None:
        """One event. Callers ask `keep` first where making `thing` costs."""
        if self.keep:
            text = brief(thing)
            self.lines.append(f"{now:10.4f} {who:<12} {what:<10} {text[:LONG]}")


def brief(thing: object) -> str:
    """A dataclass with its telling fields only; anything else as it prints."""
    if is_dataclass(thing) and not isinstance(thing, type):
        shown = ", ".join(f"{f.name}={brief(v)}" for f in fields(thing) if (v := getattr(thing, f.name)) not in _DULL)
        return f"{type(thing).__name__}({shown})"
    if isinstance(thing, tuple | list):
        items: Iterable[Any] = thing
        return "[" + " ".join(brief(item) for item in items) + "]"
    return str(thing)


_DULL: tuple[object, ...] = ("", (), None, False)


def table(counts: Counter[tuple[str, str]]) -> str:
    """The counts as text, a heading a table, rows by name."""
    out: list[str] = []
    for name in sorted({name for name, _ in counts}):
        out.append(f"{name}")
        out.extend(f"  {n:>12,}  {row}" for (which, row), n in sorted(counts.items()) if which == name)
    return "\n".join(out)
