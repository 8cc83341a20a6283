"""Decode worker -> router, `r.<router>.ev`: one frame of tokens a step, or that a sequence gave way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from splitserve.protocol.messages.columns import U1, U2, U4
from splitserve.protocol.params import TokenLogprob
from splitserve.protocol.states import FinishReason
from splitserve.protocol.trace import NO_TRACE, Trace

_REASONS = {int(reason): reason for reason in FinishReason}


@dataclass(frozen=True, slots=True)
class DecodeDurations:
    """Seconds, measured inside the decode worker, of one attempt's first token."""

    queue_s: float  # loaded (or accepted, when local) -> first scheduled
    prefill_s: float  # computing the prompt here; 0 after a transfer
    first_step_s: float


@dataclass(frozen=True, slots=True)
class FirstRow:
    """What an attempt's first row adds; `row` is its place in the frame."""

    row: int
    cached_tokens: int  # of a local prefill; 0 after a transfer
    durations: DecodeDurations


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    row: int
    tokens: tuple[TokenLogprob, ...]


class TokenRow(NamedTuple):
    """One row of a frame, taken out of its columns. A tuple, since every token of the cluster is one."""

    slot: int
    da: int
    first_index: int
    ids: tuple[int, ...]
    finish: FinishReason = FinishReason.RUNNING
    first: FirstRow | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


# a row without the constructor, which is a Python function: a token that goes through few of them costs half
_row: Callable[[tuple[object, ...]], TokenRow] = partial(tuple.__new__, TokenRow)


@dataclass(frozen=True, slots=True)
class TokenFrame:
    """The tokens of one step for one router, as columns. `stream_seq` counts this worker's frames to this router."""

    worker: str
    incarnation: int
    stream_seq: int
    slots: U4
    das: U2
    first_indices: U4
    counts: U2
    finishes: U1
    ids: U4
    firsts: tuple[FirstRow, ...] = ()
    logprobs: tuple[RowLogprobs, ...] = ()

    @classmethod
    def of(cls, worker: str, incarnation: int, stream_seq: int, rows: Iterable[TokenRow]) -> TokenFrame:
        rows = tuple(rows)
        return cls(
            worker,
            incarnation,
            stream_seq,
            slots=tuple(r.slot for r in rows),
            das=tuple(r.da for r in rows),
            first_indices=tuple(r.first_index for r in rows),
            counts=tuple(len(r.ids) for r in rows),
            finishes=tuple(int(r.finish) for r in rows),
            ids=tuple(i for r in rows for i in r.ids),
            firsts=tuple(
                FirstRow(n, r.first.cached_tokens, r.first.durations) for n, r in enumerate(rows) if r.first is not None
            ),
            logprobs=tuple(RowLogprobs(n, r.logprobs) for n, r in enumerate(rows) if r.logprobs),
        )

    def rows(self) -> Iterator[TokenRow]:
        firsts = {f.row: f for f in self.firsts}
        logprobs = {p.row: p.tokens for p in self.logprobs}
        ids, at = self.ids, 0
        columns = zip(self.slots, self.das, self.first_indices, self.counts, self.finishes, strict=True)
        for n, (slot, da, first_index, count, finish) in enumerate(columns):
            first, logprob = (firsts.get(n), logprobs.get(n, ())) if firsts or logprobs else (None, ())
            behind = at + count
            yield _row((slot, da, first_index, ids[at:behind], _REASONS[finish], first, logprob))
            at = behind


@dataclass(frozen=True, slots=True)
class Preempted:
    """The pool ran dry and this sequence gave way: its reservation is gone."""

    rid: str
    worker: str
    da: int
    trace: Trace = NO_TRACE
