from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitserve.errors import EngineFailed
from splitserve.kv.pool import BlockPool, BlockState, PoolStats
from splitserve.kv.prefix import PrefixIndex


def allocate(pool: BlockPool, n: int) -> list[int]:
    blocks = pool.allocate(n)
    assert blocks is not None
    return blocks


def test_a_generation_rises_when_a_block_is_handed_out_and_not_when_it_is_released():
    pool = BlockPool(1)
    (block,) = allocate(pool, 1)
    assert pool.generation(block) == 1
    pool.fill([block])
    pool.free([block])
    assert pool.generation(block) == 1
    allocate(pool, 1)
    assert pool.generation(block) == 2


def test_generations_may_lie_in_memory_that_others_see():
    shared = memoryview(bytearray(8 * 3)).cast("Q")
    pool = BlockPool(3, shared)
    blocks = allocate(pool, 2)

    assert [shared[block] for block in blocks] == [1, 1]
    assert sum(shared) == 2
    assert pool.generations(blocks) == (1, 1)


def test_more_blocks_than_are_available_are_refused_whole():
    pool = BlockPool(3)
    allocate(pool, 1)

    assert pool.allocate(3) is None
    assert pool.stats == PoolStats(total=3, free=2, filling=1, owned=0, cached=0)


def test_a_block_goes_from_free_through_filling_and_owned_to_cached():
    pool = BlockPool(2)
    index = PrefixIndex(pool)
    (block,) = allocate(pool, 1)
    assert pool.state(block) is BlockState.FILLING
    pool.fill([block])
    assert pool.state(block) is BlockState.OWNED
    assert pool.writable(block)
    index.insert(b"key", block)
    assert not pool.writable(block)
    pool.free([block])
    assert pool.state(block) is BlockState.CACHED
    pool.ref([block])
    assert pool.state(block) is BlockState.OWNED
    assert not pool.writable(block), "a cached block stays immutable when it is held again"


def test_an_unindexed_block_is_free_when_its_last_holder_leaves():
    pool = BlockPool(1)
    blocks = allocate(pool, 1)
    pool.fill(blocks)
    pool.ref(blocks)
    assert not pool.writable(blocks[0])
    pool.free(blocks)
    assert pool.state(blocks[0]) is BlockState.OWNED
    pool.free(blocks)
    assert pool.state(blocks[0]) is BlockState.FREE


def test_cached_blocks_are_evicted_after_free_ones_and_the_least_recently_used_first():
    pool = BlockPool(4)
    index = PrefixIndex(pool)
    blocks = allocate(pool, 3)
    pool.fill(blocks)
    for block in blocks:
        index.insert(bytes([block]), block)
    pool.free(blocks)
    pool.ref(blocks[:1])
    pool.free(blocks[:1])  # used last

    assert [allocate(pool, 1) for _ in range(4)] == [[3], [blocks[1]], [blocks[2]], [blocks[0]]]


def test_blocks_are_handed_out_in_ascending_order_whatever_order_they_were_given_back_in():
    pool = BlockPool(6)
    blocks = allocate(pool, 6)
    pool.fill(blocks)
    pool.free(reversed(blocks))
    assert allocate(pool, 4) == sorted(blocks)[2:]  # the four that were given back first, in one run


def test_a_block_freed_twice_is_an_error():
    pool = BlockPool(1)
    blocks = allocate(pool, 1)
    pool.free(blocks)
    with pytest.raises(EngineFailed, match="block 0 is free and was freed again"):
        pool.free(blocks)


def test_a_block_whose_content_is_not_there_can_neither_be_shared_nor_indexed():
    pool = BlockPool(2)
    (block,) = allocate(pool, 1)
    with pytest.raises(EngineFailed, match="filling"):
        pool.ref([block])
    with pytest.raises(EngineFailed, match="filling"):
        PrefixIndex(pool).insert(b"key", block)
    with pytest.raises(EngineFailed, match="free"):
        pool.ref([1])


class PoolMachine(RuleBasedStateMachine):
    """Invariants 1 to 3 of the protocol: pool and index against lists of holders, contents, and handles read late.

    Content is a number that is unique for each writing; a handle is (block, generation, content) noted while held.
    """

    def __init__(self) -> None:
        super().__init__()
        self.holders: list[list[int]] = []  # each holds one ref on each of its blocks
        self.filling: set[int] = set()
        self.content: dict[int, int] = {}
        self.keys: dict[int, int] = {}  # block -> key, as indexed
        self.handles: list[tuple[int, int, int]] = []
        self.writes = 0

    @initialize(blocks=st.integers(1, 8))
    def start(self, blocks: int) -> None:
        self.pool = BlockPool(blocks)
        self.index = PrefixIndex(self.pool)

    def refs(self, block: int) -> int:
        return sum(holder.count(block) for holder in self.holders)

    @rule(n=st.integers(1, 4))
    def allocate(self, n: int) -> None:
        before = self.pool.generations(range(self.pool.total))
        available = self.pool.stats.free + self.pool.stats.cached
        blocks = self.pool.allocate(n)
        assert (blocks is None) == (n > available)
        after = self.pool.generations(range(self.pool.total))
        for block in range(self.pool.total):
            assert after[block] - before[block] == int(block in (blocks or ()))
        if blocks:
            assert all(self.refs(block) == 0 for block in blocks)
            self.holders.append(blocks)
            self.filling.update(blocks)
            for block in blocks:
                self.keys.pop(block, None)
                self.write(block)

    def write(self, block: int) -> None:
        assert self.pool.writable(block)
        self.writes += 1
        self.content[block] = self.writes

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.pool.fill(holder)
        self.filling.difference_update(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), key=st.integers(0, 5))
    def insert(self, data: st.DataObject, key: int) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.holders))))
        if block in self.filling:
            return
        new = key not in self.keys.values() and block not in self.keys
        assert self.index.insert(bytes([key]), block) == new
        if new:
            self.keys[block] = key

    @rule(key=st.integers(0, 5))
    def match_and_hold(self, key: int) -> None:
        blocks = self.index.match([bytes([key])])
        assert blocks == [block for block, other in self.keys.items() if other == key]
        if blocks:
            self.pool.ref(blocks)
            self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        if not self.filling.intersection(holder):
            self.pool.ref(holder)
            self.holders.append(list(holder))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def note_handle(self, data: st.DataObject) -> None:
        for block in data.draw(st.sampled_from(self.holders)):
            if block not in self.filling:
                self.handles.append((block, self.pool.generation(block), self.content[block]))
                self.pool.ref([block])
                self.holders.append([block])  # the lease

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.free(reversed(holder))
        self.filling = {block for block in self.filling if self.refs(block)}

    @invariant()
    def blocks_are_counted_once(self) -> None:
        if not hasattr(self, "pool"):
            return
        states = [self.expected(block) for block in range(self.pool.total)]
        assert [self.pool.state(block) for block in range(self.pool.total)] == states
        assert [self.pool.refs(block) for block in range(self.pool.total)] == [
            self.refs(block) for block in range(self.pool.total)
        ]
        assert self.pool.stats == PoolStats(
            self.pool.total, *(states.count(state) for state in (
                BlockState.FREE, BlockState.FILLING, BlockState.OWNED, BlockState.CACHED))
        )  # fmt: skip

    def expected(self, block: int) -> BlockState:
        if block in self.filling:
            return BlockState.FILLING
        if self.refs(block):
            return BlockState.OWNED
        return BlockState.CACHED if block in self.keys else BlockState.FREE

    @invariant()
    def only_single_holders_of_unindexed_blocks_may_write(self) -> None:
        if hasattr(self, "pool"):
            for block in range(self.pool.total):
                assert self.pool.writable(block) == (self.refs(block) == 1 and block not in self.keys)

    @invariant()
    def a_read_that_validates_returns_what_the_handle_named(self) -> None:
        for block, generation, content in self.handles:
            if self.pool.generation(block) == generation:
                assert self.content[block] == content


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
