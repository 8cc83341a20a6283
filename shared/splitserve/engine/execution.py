"""Running a batch so that one bad row does not take the others with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from splitserve.engine.batch import Runner, StepBatch, StepOutput
from splitserve.protocol.params import TokenLogprob

logger = logging.getLogger("splitserve.engine")

NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Execution:
    """What came of a batch. `failures`: row -> message; a failed row's samples are NO_TOKEN in `output`."""

    output: StepOutput
    failures: Mapping[int, str] = field(default_factory=dict[int, str])


def execute(runner: Runner, batch: StepBatch) -> Execution:
    """Run the batch; if that raises, each row alone.

    A row may run twice: it writes the same KV at the same positions, and a sampled token is a pure function (D8).
    """
    try:
        return Execution(runner.execute(batch))
    except Exception as error:
        logger.exception("step_failed", extra={"rows": len(batch.rows)})
        if len(batch.rows) == 1:
            return Execution(_nothing(len(batch.rows[0].samples)), {0: _message(error)})
    ids: list[int] = []
    logprobs: list[TokenLogprob | None] = []
    failures: dict[int, str] = {}
    for number, row in enumerate(batch.rows):
        try:
            output = runner.execute(StepBatch((row,), int(number < batch.num_decodes)))
        except Exception as error:
            logger.exception("row_failed", extra={"row": number})
            failures[number] = _message(error)
            output = _nothing(len(row.samples))
        ids.extend(output.ids)
        logprobs.extend(output.logprobs)
    return Execution(StepOutput(tuple(ids), tuple(logprobs)), failures)


def _nothing(samples: int) -> StepOutput:
    return StepOutput((NO_TOKEN,) * samples, (None,) * samples)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
