"""The tutorial begins here. Read the files in order; each runs in milliseconds, without a model and without a cluster.

1 blocks · 2 the handle and its lease · 3 a core that only decides · 4 the engine's step · 5 the sampler ·
6 one request's biography · 7 the metrics

**Blocks.** What a model remembers of a text is its KV cache: a key and a value for every token and layer. It is kept in
blocks of a fixed number of tokens. A block is the unit of everything: of allocation, of reuse, of transfer, of accounting.
"""

from __future__ import annotations

from splitserve.kv.pool import BlockPool, BlockState
from splitserve.kv.prefix import PrefixIndex, block_hashes, chain_seed

BLOCK_TOKENS = 4
SEED = chain_seed("fingerprint of a model and its KV layout")


def test_a_block_is_filled_then_owned_and_free_again_when_its_last_holder_leaves() -> None:
    pool = BlockPool(8)
    blocks = pool.allocate(2)
    assert blocks is not None
    assert pool.state(blocks[0]) is BlockState.FILLING
    pool.fill(blocks)
    pool.ref(blocks)  # a second sequence reads the same prompt: it shares the blocks
    pool.free(blocks)
    assert pool.state(blocks[0]) is BlockState.OWNED
    pool.free(blocks)
    assert pool.state(blocks[0]) is BlockState.FREE


def test_a_pool_gives_all_that_is_asked_for_or_nothing() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.available == 3


def test_the_name_of_a_block_is_a_hash_of_its_tokens_and_of_all_before_them() -> None:
    once = block_hashes(range(10), BLOCK_TOKENS, SEED)
    assert len(once) == 2  # the last two of ten tokens fill no block: only full ones have names
    same_second_block = block_hashes((9, 9, 9, 9, 4, 5, 6, 7), BLOCK_TOKENS, SEED)
    assert same_second_block[1] != once[1]  # the same tokens after another beginning are another content
    assert block_hashes(range(10), BLOCK_TOKENS, chain_seed("another model"))[0] != once[0]


def test_a_prompt_that_begins_as_an_earlier_one_finds_its_blocks_in_the_prefix_cache() -> None:
    pool = BlockPool(8)
    index = PrefixIndex(pool)
    names = block_hashes(range(8), BLOCK_TOKENS, SEED)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.fill(blocks)
    for name, block in zip(names, blocks, strict=True):
        index.insert(name, block)
    pool.free(blocks)
    assert pool.state(blocks[0]) is BlockState.CACHED  # nobody holds it, and it is still worth something
    assert index.match(block_hashes((*range(8), 50, 51), BLOCK_TOKENS, SEED)) == blocks
    assert index.match(block_hashes((50, 51, 52, 53), BLOCK_TOKENS, SEED)) == []


def test_when_blocks_run_short_the_longest_unused_one_gets_new_content_and_a_new_generation() -> None:
    pool = BlockPool(1)
    index = PrefixIndex(pool)
    (name,) = block_hashes(range(4), BLOCK_TOKENS, SEED)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.fill(blocks)
    index.insert(name, blocks[0])
    before = pool.generation(blocks[0])
    pool.free(blocks)
    assert pool.generation(blocks[0]) == before  # released, and still validly readable
    assert pool.allocate(1) == blocks
    assert pool.generation(blocks[0]) == before + 1  # whoever reads it for its old content can tell, and does
    assert index.match([name]) == []
