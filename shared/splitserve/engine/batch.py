"""What the scheduler hands to a runner, and what comes back. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from splitserve.protocol.params import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to sample from a row's last position: a pure function of these five (protocol D8).

    `ids` are prompt and output ids so far, live lists of the sequence: read only, during the step.
    """

    params: SamplingParams
    seed: int
    index: int  # of the output token to sample
    prompt_len: int
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepRow:
    """`ids` of one sequence to feed at positions [start, start + len(ids)), with its block table of each group.

    KV of positions below `start` is in the blocks already; the row's own KV is written in the step.
    """

    ids: Sequence[int]
    start: int
    tables: Sequence[Sequence[int]]  # [group][block]
    samples: tuple[SampleRow, ...] = ()  # n > 1 only for a prompt that n sequences share


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows of one step: decodes (one token, one sample) first, then chunks."""

    rows: tuple[StepRow, ...]
    num_decodes: int


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Sampled ids in order of the rows' samples; `logprobs[i]` is None where not asked for."""

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]


class Runner(Protocol):
    """Computes a step. The torch one writes KV into the pool; the simulator's toy one hashes ids."""

    def execute(self, batch: StepBatch) -> StepOutput: ...
