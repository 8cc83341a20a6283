"""A worker's toy KV, watched: who writes which block, and what each generation of a block held (invariants 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence

from simulation.invariants import require
from splitserve.kv.pool import BlockPool, BlockState
from support.toy_runner import GARBAGE, Content, ToyStorage

Sealed = tuple[int, int]  # (block, generation)


class Memory(ToyStorage):
    """One life's KV; it outlives its process. A cell is written once a generation, by the engine or by a fetch."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        super().__init__(blocks, block_tokens)
        self.generations = [0] * blocks
        self.pool = BlockPool(blocks, self.generations)
        self.sealed: dict[Sealed, Content] = {}  # what a handle named: checked against every read that validates
        self._written: list[list[int]] = [[GARBAGE] * block_tokens for _ in range(blocks)]
        self._written_in = [0] * blocks  # the generation that `_written` is of

    def seal(self, blocks: Sequence[int], generations: Sequence[int]) -> None:
        """A handle names these blocks from now on: whatever handle does it again, their content is the same."""
        for block, generation in zip(blocks, generations, strict=True):
            content = self.read(block)
            named = self.sealed.setdefault((block, generation), content)
            text = f"block {block}@{generation} held {named} when it was first told, {content} later"
            require(named == content, "what_is_readable_does_not_change", text)

    def put(self, table: Sequence[int], start: int, ids: Sequence[int]) -> None:
        """By the engine: GARBAGE while a step is writing, then the ids."""
        size, cells = self.block_tokens, self.cells
        for position, token in enumerate(ids, start):
            block, offset = table[position // size], position % size
            if not self.pool.writable(block):
                state = self.pool.state(block)
                require(False, "writes_meet_unshared_blocks", f"{block} is {state}, {self.pool.refs(block)} refs")
            cells[block][offset] = token
            if token != GARBAGE:
                self._once(block, offset, token)

    def fill(self, block: int, generation: int, start: int, part: Sequence[int]) -> None:
        """By a fetch, a part of a block: it must still be the block that was reserved for it."""
        rule = "a_fetch_writes_only_its_reservation"
        require(self.generations[block] == generation, rule, f"block {block} is another's by now")
        require(self.pool.state(block) is BlockState.FILLING, rule, f"block {block} is {self.pool.state(block)}")
        self.cells[block][start : start + len(part)] = part

    def _once(self, block: int, offset: int, token: int) -> None:
        if self._written_in[block] != self.generations[block]:
            self._written_in[block] = self.generations[block]
            self._written[block] = [GARBAGE] * self.block_tokens
        old = self._written[block][offset]
        if old not in (GARBAGE, token):
            require(False, "one_content_a_generation", f"block {block}[{offset}] held {old}, now {token}")
        self._written[block][offset] = token
