"""The answers of one request: append-only, gapless, each index once (invariant 4)."""

from __future__ import annotations

from splitserve.protocol.messages import TokenRow
from splitserve.protocol.params import TokenLogprob
from splitserve.protocol.states import FinishReason
from splitserve.router.generation import Finished, Tokens

_RUNNING = FinishReason.RUNNING  # Python 3.11 takes as long to look an enum's member up as to call a function


class Transcript:
    """Tokens and ends of n answers. Also knows how far the current decode worker is said to be, to see gaps."""

    __slots__ = ("_heard", "_index_once", "ends", "n", "outputs")

    def __init__(self, n: int, *, index_once: bool = True) -> None:
        self.n = n
        self.outputs: list[list[int]] = [[] for _ in range(n)]
        self.ends: list[FinishReason | None] = [None] * n  # None: open
        self._heard: list[int] = [0] * n  # length that the current attempt claims
        self._index_once = index_once

    def __len__(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def closed(self) -> bool:
        """Every answer has ended."""
        return None not in self.ends

    def snapshot(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self.outputs))

    def heard(self, choice: int, length: int) -> None:
        """The current attempt says that it has `length` tokens of this answer."""
        if length > self._heard[choice]:
            self._heard[choice] = length

    def forget_heard(self) -> None:
        """A new attempt: what the old one claimed counts no more."""
        self._heard = [0] * self.n

    @property
    def behind(self) -> bool:
        """Some open answer lacks tokens that the current attempt has."""
        if self.n == 1:  # asked once a token
            return len(self.outputs[0]) < self._heard[0] and self.ends[0] is None
        for ids, end, heard in zip(self.outputs, self.ends, self._heard, strict=True):
            if len(ids) < heard and end is None:
                return True
        return False

    def next(self, choice: int, row: TokenRow) -> Tokens | None:
        """Take a row that is just the next of a running answer, as nearly every one is; else None, and `append` it."""
        _, _, first_index, ids, finish, _, logprobs = row
        have = self.outputs[choice]
        if first_index != len(have) or finish is not _RUNNING or not ids or self.ends[choice] is not None:
            return None
        have.extend(ids)
        length = len(have)
        if length > self._heard[choice]:
            self._heard[choice] = length
        return Tokens(choice, first_index, ids, logprobs)

    def append(
        self,
        choice: int,
        first_index: int,
        ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] = (),
        finish: FinishReason = FinishReason.RUNNING,
    ) -> list[Tokens | Finished]:
        """Take a row; what is new of it, as events. A row behind a gap gives nothing (see `behind`)."""
        have = self.outputs[choice]
        self.heard(choice, first_index + len(ids) + (finish is not FinishReason.RUNNING and not ids))
        if self.ends[choice] is not None:
            return []
        known = len(have) - first_index if self._index_once else 0
        if known < 0 or known > len(ids):
            return []
        events: list[Tokens | Finished] = []
        if known < len(ids):
            events.append(Tokens(choice, len(have), ids[known:], logprobs[known:]))
            have.extend(ids[known:])
        if finish is not FinishReason.RUNNING:
            self.ends[choice] = finish
            events.append(Finished(choice, finish))
        return events

    def stop(self, choice: int) -> bool:
        """End an open answer from our side. False when it has ended already."""
        if self.ends[choice] is not None:
            return False
        self.ends[choice] = FinishReason.STOP
        return True
