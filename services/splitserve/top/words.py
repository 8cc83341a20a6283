"""Numbers as a person reads them."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """Three digits: 840 µs, 12.3 ms, 1.45 s."""
    if seconds is None:
        return "–"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{_digits(seconds * 1000)} ms"
    return f"{_digits(seconds)} s" if seconds < 120 else age(seconds)


def age(seconds: float) -> str:
    """A long time in its largest unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds // 1:.0f} s"


def share(part: float, width: int) -> tuple[str, str]:
    """A bar of `width` cells: its full part and its empty one."""
    full = round(min(1.0, max(0.0, part)) * width)
    return "█" * full, "░" * (width - full)


def _digits(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
