from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.kv.pool import BlockPool
from splitserve.kv.prefix import HASH_BYTES, PrefixIndex, block_hashes, chain_seed, extend_hashes

SEED = chain_seed("model")
IDS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_a_block_hash_is_sha256_over_parent_and_little_endian_ids_cut_to_16_bytes():
    first, second = block_hashes([1, 2, 3, 2**32 - 1, 9], 2, SEED)

    assert first == sha256(SEED + bytes([1, 0, 0, 0, 2, 0, 0, 0])).digest()[:HASH_BYTES]
    assert second == sha256(first + bytes([3, 0, 0, 0, 255, 255, 255, 255])).digest()[:HASH_BYTES]


@given(IDS, IDS, st.integers(1, 5))
def test_chains_are_equal_exactly_as_far_as_the_ids_are(one: list[int], other: list[int], block_tokens: int):
    ours, theirs = block_hashes(one, block_tokens, SEED), block_hashes(other, block_tokens, SEED)

    assert len(ours) == len(one) // block_tokens
    for n, (left, right) in enumerate(zip(ours, theirs, strict=False), 1):
        assert (left == right) == (one[: n * block_tokens] == other[: n * block_tokens])


@given(IDS, st.integers(1, 5), st.data())
def test_a_chain_grown_piece_by_piece_equals_the_whole(ids: list[int], block_tokens: int, data: st.DataObject):
    grown: list[bytes] = []
    for cut in sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4))):
        extend_hashes(grown, ids[:cut], block_tokens, SEED)
    extend_hashes(grown, ids, block_tokens, SEED)

    assert grown == block_hashes(ids, block_tokens, SEED)


@pytest.mark.parametrize(
    "other", [chain_seed("model2"), chain_seed("model", "lora"), chain_seed("model", cache_salt="tenant")]
)
def test_other_models_adapters_and_salts_never_share_a_chain(other: bytes):
    assert not set(block_hashes(range(8), 2, SEED)) & set(block_hashes(range(8), 2, other))


def test_parts_of_a_seed_cannot_be_shifted_into_each_other():
    assert chain_seed("ab", "c") != chain_seed("a", "bc")
    assert chain_seed("ab", "", "c") != chain_seed("ab", "c")


def filled(pool: BlockPool, n: int) -> list[int]:
    blocks = pool.allocate(n)
    assert blocks is not None
    pool.fill(blocks)
    return blocks


def test_match_gives_the_longest_indexed_prefix_within_the_limit():
    pool = BlockPool(8)
    index = PrefixIndex(pool)
    hashes = block_hashes(range(8), 2, SEED)
    blocks = filled(pool, 4)
    for key, block in zip(hashes[:3], blocks, strict=False):
        assert index.insert(key, block)

    assert index.match(hashes) == blocks[:3]
    assert index.match(hashes, 2) == blocks[:2]
    assert index.match(hashes[1:]) == blocks[1:3]
    assert index.match(block_hashes([7, 7, 2, 3], 2, SEED)) == []


def test_the_first_block_of_a_hash_stays_and_a_later_one_is_left_unindexed():
    pool = BlockPool(4)
    index = PrefixIndex(pool)
    first, second = filled(pool, 2)
    key, other = block_hashes(range(4), 2, SEED)

    assert index.insert(key, first)
    assert not index.insert(key, second)
    assert not index.insert(other, first)
    assert index.match([key]) == [first]
    assert pool.writable(second)


def test_an_evicted_block_is_no_longer_found():
    pool = BlockPool(2)
    index = PrefixIndex(pool)
    hashes = block_hashes(range(4), 2, SEED)
    blocks = filled(pool, 2)
    for key, block in zip(hashes, blocks, strict=True):
        index.insert(key, block)
    pool.free(reversed(blocks))

    assert pool.allocate(1) == [blocks[1]], "the leaf goes before its parent"
    assert index.match(hashes) == blocks[:1]
    assert len(index) == 1
