"""Computes a step: rows through the model, then a token for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from splitserve.engine.batch import StepBatch, StepOutput, StepRow
from splitserve.engine.sampler import Sampler


class PagedLogits(Protocol):
    """A model over paged KV: `engine.forward.PagedModel`, or one whose steps are captured."""

    def logits(self, rows: Sequence[StepRow], num_decodes: int, keep: Sequence[int]) -> torch.Tensor: ...
    def wait(self) -> None: ...


class TorchRunner:
    """`engine.batch.Runner` over torch. One thread calls it at a time."""

    def __init__(self, paged: PagedLogits, sampler: Sampler) -> None:
        self._paged = paged
        self._sampler = sampler

    @torch.inference_mode()
    def execute(self, batch: StepBatch) -> StepOutput:
        """KV of all rows is in their blocks when this returns."""
        keep: list[int] = []  # the last token of each row that samples
        source: list[int] = []  # which of those each sample reads
        last = -1
        for row in batch.rows:
            last += len(row.ids)
            if row.samples:
                source += [len(keep)] * len(row.samples)
                keep.append(last)
        logits = self._paged.logits(batch.rows, batch.num_decodes, keep)
        if len(source) != len(keep):
            logits = logits[source]
        samples = [sample for row in batch.rows for sample in row.samples]
        ids, logprobs = self._sampler(logits, samples)
        if not samples:
            self._paged.wait()  # reading ids waits for the device; without any, wait here
        return StepOutput(ids, logprobs)
