"""Prefix reuse: a chain of block hashes names the tokens of a block and all before it (engine.md §1).

sha256, cut to 16 bytes: with a weak hash one user's KV could be made to collide with another's (GHSA-rm76-4mrf-v9r8).
The router computes the same chains for placement.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import sha256
from itertools import islice

from splitserve.kv.pool import BlockPool

HASH_BYTES = 16


def chain_seed(fingerprint: str, adapter: str = "", cache_salt: str = "") -> bytes:
    """Parent of a chain's first block: chains of other models, adapters or salts never meet."""
    seed = sha256()
    for part in (fingerprint, adapter, cache_salt):
        data = part.encode()
        seed.update(len(data).to_bytes(8, "little"))
        seed.update(data)
    return seed.digest()[:HASH_BYTES]


def extend_hashes(hashes: list[bytes], ids: Sequence[int], block_tokens: int, seed: bytes) -> None:
    """Append the hashes of the full blocks of `ids` that `hashes` lacks; it holds those of the first blocks already."""
    done, full = len(hashes), len(ids) // block_tokens
    if done >= full:
        return
    words = array("I", ids[done * block_tokens : full * block_tokens])
    if sys.byteorder == "big":
        words.byteswap()
    data, width = words.tobytes(), 4 * block_tokens
    parent = hashes[-1] if hashes else seed
    for at in range(0, len(data), width):
        parent = sha256(parent + data[at : at + width]).digest()[:HASH_BYTES]
        hashes.append(parent)


def block_hashes(ids: Sequence[int], block_tokens: int, seed: bytes) -> list[bytes]:
    """The chain of `ids`: one hash for each full block of `block_tokens` ids, `seed` from `chain_seed`."""
    hashes: list[bytes] = []
    extend_hashes(hashes, ids, block_tokens, seed)
    return hashes


class PrefixIndex:
    """Which block of a pool holds the content of a hash. A block is in it until the pool evicts it."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        pool.on_evict(self._forget)

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, hashes: Sequence[bytes], limit: int | None = None) -> list[int]:
        """Blocks of the longest indexed prefix of `hashes[:limit]`. No ref is taken."""
        blocks: list[int] = []
        for key in islice(hashes, limit):
            block = self._blocks.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, key: bytes, block: int) -> bool:
        """Index an OWNED block; False and nothing done when the hash has a block, or the block a hash, already."""
        if key in self._blocks or block in self._hashes:
            return False
        self._pool.mark_indexed(block)
        self._blocks[key] = block
        self._hashes[block] = key
        return True

    def _forget(self, block: int) -> None:
        del self._blocks[self._hashes.pop(block)]
