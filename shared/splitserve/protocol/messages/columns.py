"""Fields that travel as raw little-endian bytes behind the JSON head, not in it (protocol D10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, slots=True)
class Tail:
    """Mark of a field that travels behind the head: `code` is an `array` type code, `nested` a tuple of tuples."""

    code: str
    nested: bool = False


U1 = Annotated[tuple[int, ...], Tail("B")]
U2 = Annotated[tuple[int, ...], Tail("H")]
U4 = Annotated[tuple[int, ...], Tail("I")]
U8 = Annotated[tuple[int, ...], Tail("Q")]
U4Lists = Annotated[tuple[tuple[int, ...], ...], Tail("I", nested=True)]
