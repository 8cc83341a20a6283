"""Frames in: which answer a slot belongs to, and whether a worker's stream has a gap."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True, slots=True)
class SlotOwner:
    rid: str
    choice: int


class Inbox:
    """Slots count up and are never reused in a router's life; `fresh_slots` False (simulator only) reuses them."""

    def __init__(self, *, fresh_slots: bool = True) -> None:
        self._fresh = fresh_slots
        self._next = 0
        self._owners: dict[int, SlotOwner] = {}
        self._seqs: dict[tuple[str, int], int] = {}  # a worker's life -> its last stream_seq that we saw

    def __len__(self) -> int:
        return len(self._owners)

    def open(self, rid: str, n: int) -> int:
        """The first of n new slots in a row."""
        if not self._fresh:
            self._next = next(s for s in count() if self._free(s, n))
        first = self._next
        self._owners.update((first + i, SlotOwner(rid, i)) for i in range(n))
        self._next += n
        return first

    def _free(self, first: int, n: int) -> bool:
        return all(first + i not in self._owners for i in range(n))

    def close(self, first: int, n: int) -> None:
        for slot in range(first, first + n):
            self._owners.pop(slot, None)

    def owner(self, slot: int) -> SlotOwner | None:
        """None: the slot's job is over."""
        return self._owners.get(slot)

    def advance(self, life: tuple[str, int], seq: int, *, frame: bool) -> bool:
        """A frame of this `stream_seq` came, or a digest that names it as the last sent. True: something before is missing."""
        last = self._seqs.get(life, 0)
        self._seqs[life] = max(last, seq)
        return seq > last + (1 if frame else 0)

    def forget(self, life: tuple[str, int]) -> None:
        self._seqs.pop(life, None)
