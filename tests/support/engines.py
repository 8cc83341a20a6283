"""An engine over the toy model with everything checked that may be: writes, order of rows, limits, blocks, ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from splitserve.engine import door
from splitserve.engine.batch import StepBatch, StepOutput
from splitserve.engine.engine import Engine
from splitserve.engine.sequence import EngineConfig
from splitserve.kv.pool import BlockPool, BlockState
from splitserve.kv.prefix import PrefixIndex
from splitserve.protocol.params import SamplingParams
from support.toy_runner import ToyRunner, ToyStorage

LAST = (door.Gone, door.Preempted, door.Failed, door.Rejected)


class CheckedRunner:
    """The toy model, plus: no write to a block that is indexed or shared, decodes first, no limit passed."""

    def __init__(self, pool: BlockPool, config: EngineConfig) -> None:
        self.toy = ToyRunner(ToyStorage(pool.total, config.block_tokens))
        self.batches: list[StepBatch] = []
        self.raises_on: set[int] = set()  # ids that this model cannot bear
        self._pool = pool
        self._config = config

    def execute(self, batch: StepBatch) -> StepOutput:
        size = self._config.block_tokens
        self.batches.append(batch)
        assert len(batch.rows) <= self._config.max_num_seqs
        assert all(len(row.ids) == len(row.samples) == 1 for row in batch.rows[: batch.num_decodes])
        assert sum(len(row.ids) for row in batch.rows[batch.num_decodes :]) <= (
            self._config.chunk_tokens
            if batch.num_decodes
            else max(self._config.chunk_tokens, self._config.lone_chunk_tokens)
        )
        for row in batch.rows:
            assert row.ids
            last = row.start + len(row.ids) - 1
            written = row.tables[0][row.start // size : last // size + 1]
            assert len(written) == last // size - row.start // size + 1
            assert all(self._pool.writable(block) for block in written)
            if self.raises_on.intersection(row.ids):
                raise RuntimeError("bad id")
        return self.toy.execute(batch)


class Bench:
    """One engine, a clock that ticks a second a reading, and what came out, by key."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_tokens: int = 4,
        max_num_seqs: int = 8,
        chunk_tokens: int = 16,
        max_model_len: int = 256,
        eos_ids: Sequence[int] = (),
        prefix_caching: bool = True,
        fingerprint: str = "toy",
        lone_chunk_tokens: int = 0,
        tokens_a_decode: int = 0,
    ) -> None:
        self.config = EngineConfig(
            block_tokens,
            max_num_seqs,
            chunk_tokens,
            max_model_len,
            frozenset(eos_ids),
            fingerprint,
            prefix_caching,
            lone_chunk_tokens,
            tokens_a_decode,
        )
        self.pool = BlockPool(blocks)
        self.runner = CheckedRunner(self.pool, self.config)
        self.now = 0.0
        self.engine = Engine(self.config, self.pool, PrefixIndex(self.pool), self.runner, self._clock)
        self.events: dict[door.Key, list[door.Event]] = defaultdict(list)
        self.outputs: dict[tuple[door.Key, int], list[int]] = {}
        self.batches: list[door.Batch] = []

    def _clock(self) -> float:
        self.now += 1.0
        return self.now

    def add(
        self,
        key: door.Key,
        ids: Sequence[int],
        mode: door.Mode = door.Mode.LOCAL,
        *,
        max_tokens: int = 8,
        n: int = 1,
        outputs: Sequence[Sequence[int]] | None = None,
        prompt_len: int | None = None,
        params: SamplingParams | None = None,
        priority: int = 0,
    ) -> None:
        """Submit a job whose sequence i has seed 100 + i."""
        given = tuple(tuple(output) for output in (outputs or [()] * n))
        for number, output in enumerate(given):
            self.outputs[key, number] = list(output)
        self.engine.submit(
            door.Add(
                key, mode, tuple(ids), len(ids) if prompt_len is None else prompt_len, given,
                params or SamplingParams(max_tokens=max_tokens),
                tuple(100 + number for number in range(len(given))), priority,
            )
        )  # fmt: skip

    def load(self, key: door.Key, ids: Sequence[int], index: int = 0, first_ids: Sequence[int] = ()) -> None:
        """What a transfer does: write the blocks that were not cached, then say so."""
        (reserved,) = (event for event in self.events[key] if isinstance(event, door.Reserved))
        size = self.config.block_tokens
        for number in range(reserved.cached_blocks, len(reserved.groups[0])):
            assert self.pool.state(reserved.groups[0][number]) is BlockState.FILLING
        self.runner.toy.storage.put(
            reserved.groups[0], reserved.cached_blocks * size, ids[reserved.cached_blocks * size :]
        )
        for number, token in enumerate(first_ids):
            output = self.outputs[key, number]
            if len(output) == index:
                output.append(token)
        self.engine.submit(door.Loaded(key, index, tuple(first_ids)))

    def answer(self) -> None:
        """One round of commands."""
        self._take(self.engine.answer())

    def step(self) -> None:
        self._take(self.engine.step())

    def run(self, limit: int = 10_000) -> None:
        """Steps until nothing can go on."""
        while self.engine.has_work:
            limit -= 1
            assert limit, "the engine never comes to rest"
            self.step()

    def last(self, key: door.Key) -> door.Event:
        return self.events[key][-1]

    def of(self, key: door.Key, kind: type[door.Event]) -> list[door.Event]:
        return [event for event in self.events[key] if isinstance(event, kind)]

    def _take(self, batch: door.Batch | None) -> None:
        if batch is None:
            return
        self.batches.append(batch)
        pool = batch.pool
        assert pool.free + pool.filling + pool.owned + pool.cached == pool.total
        for event in batch.events:
            told = self.events[event.key]
            assert not (told and isinstance(told[-1], LAST)), f"{event} follows the end of {event.key}"
            told.append(event)
            if isinstance(event, door.TokenEvent):
                output = self.outputs[event.key, event.sequence]
                assert event.first_index == len(output)
                output.extend(event.ids)
