"""A toy model whose KV is the ids themselves: a token is a hash of what is read back through the block table.

So a wrong table, a block reused too early or a fetch that read too late gives another token. Used by the engine's own
tests and by the cluster simulator, one storage a worker.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from zlib import crc32

from splitserve.engine.batch import StepBatch, StepOutput
from splitserve.protocol.params import TokenLogprob

GARBAGE = 0xFFFFFFFF  # content of a position that is being written, or never was

Content = tuple[int, ...]


def toy_token(ids: Sequence[int], seed: int, index: int, vocab: int = 97, variant: int = 0) -> int:
    """The token after `ids`, in [0, vocab)."""
    return crc32(array("Q", (seed, index, variant)).tobytes() + array("I", ids).tobytes()) % vocab


def toy_logprob(token: int) -> float:
    return -1.0 - token / 100


class ToyStorage:
    """KV of one worker: `block_tokens` ids a block. `read` and `write` are what a transfer does."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.cells = [[GARBAGE] * block_tokens for _ in range(blocks)]

    def read(self, block: int) -> Content:
        return tuple(self.cells[block])

    def write(self, block: int, content: Content) -> None:
        self.cells[block][:] = content

    def gather(self, table: Sequence[int], tokens: int) -> list[int]:
        """Positions [0, tokens) through a block table."""
        ids: list[int] = []
        for block in table[: -(-tokens // self.block_tokens)]:
            ids += self.cells[block]
        del ids[tokens:]
        return ids

    def put(self, table: Sequence[int], start: int, ids: Sequence[int]) -> None:
        """Write positions [start, start + len(ids))."""
        size, cells = self.block_tokens, self.cells
        for position, token in enumerate(ids, start):
            cells[table[position // size]][position % size] = token


class ToyRunner:
    """`execute` = `begin` (what will be written turns to garbage) + `end` (it is written, tokens are sampled).

    `variant` is called once a sample and mixed in: a model whose tokens vary from run to run, as bf16's do.
    """

    def __init__(self, storage: ToyStorage, vocab: int = 97, variant: Callable[[], int] = lambda: 0) -> None:
        self.storage = storage
        self.vocab = vocab
        self._variant = variant
        self.computed_tokens = 0

    def begin(self, batch: StepBatch) -> None:
        for row in batch.rows:
            self.storage.put(row.tables[0], row.start, [GARBAGE] * len(row.ids))

    def end(self, batch: StepBatch) -> StepOutput:
        storage, ids = self.storage, list[int]()
        logprobs: list[TokenLogprob | None] = []
        for row in batch.rows:
            storage.put(row.tables[0], row.start, row.ids)
            self.computed_tokens += len(row.ids)
        for row in batch.rows:
            if not row.samples:
                continue
            read = storage.gather(row.tables[0], row.start + len(row.ids))
            for sample in row.samples:
                token = toy_token(read, sample.seed, sample.index, self.vocab, self._variant())
                ids.append(token)
                logprobs.append(None if sample.params.logprobs is None else TokenLogprob(toy_logprob(token), 1))
        return StepOutput(tuple(ids), tuple(logprobs))

    def execute(self, batch: StepBatch) -> StepOutput:
        self.begin(batch)
        return self.end(batch)


def reference(prompt: Sequence[int], seed: int, count: int, outputs: Sequence[int] = (), vocab: int = 97) -> list[int]:
    """`count` output tokens of an undisturbed run, `outputs` first."""
    ids, made = [*prompt, *outputs], list(outputs)
    while len(made) < count:
        made.append(toy_token(ids, seed, len(made), vocab))
        ids.append(made[-1])
    return made
