"""Block tables of spans: matched, allocated, grown, shared, indexed and given back. The only user of pool and prefix index.

One layer group for now: `span.tables[0]`. A block is written only by its single holder and only before it is indexed;
n sequences therefore share a prompt's whole blocks, one takes the partial last block and the others compute its few
tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence

from splitserve.engine.sequence import Span, blocks_for
from splitserve.kv.pool import BlockPool
from splitserve.kv.prefix import PrefixIndex, extend_hashes


class BlockTables:
    """`prefix` None: no reuse."""

    def __init__(self, pool: BlockPool, prefix: PrefixIndex | None, block_tokens: int) -> None:
        self.pool = pool
        self._prefix = prefix
        self._block_tokens = block_tokens

    def lookup(self, span: Span, hash_seed: bytes) -> list[int]:
        """Indexed blocks of its longest prefix, whole blocks, at most all ids but the last: that one is computed anew."""
        extend_hashes(
            span.hashes, span.ids, self._block_tokens, hash_seed
        )  # without an index too: handles prove by them
        if self._prefix is None:
            return []
        return self._prefix.match(span.hashes, (len(span.ids) - 1) // self._block_tokens)

    def start(self, span: Span, hash_seed: bytes, spare: int = 0) -> bool:
        """Give the span blocks for all of its ids, cached ones first (`computed` counts them).

        False, and nothing held, unless `spare` blocks stay available besides.
        """
        cached = self.lookup(span, hash_seed)
        self.pool.ref(cached)
        need = blocks_for(len(span.ids), self._block_tokens) - len(cached)
        fresh = self.pool.allocate(need) if self.pool.available >= need + spare else None
        if fresh is None:
            self.pool.free(reversed(cached))
            return False
        span.tables[0][:] = cached + fresh
        span.computed = len(cached) * self._block_tokens
        return True

    def grow(self, span: Span) -> bool:
        """Blocks for ids that came since; False when the pool is dry."""
        table = span.tables[0]
        need = blocks_for(len(span.ids), self._block_tokens) - len(table)
        if need <= 0:
            return True
        fresh = self.pool.allocate(need)
        if fresh is None:
            return False
        table.extend(fresh)
        return True

    def written(self, span: Span, end: int, hash_seed: bytes) -> None:
        """KV of positions up to `end` is in the blocks: index those that are full."""
        start, span.computed = span.computed, end
        size = self._block_tokens
        first, full = start // size, end // size
        if start % size and first == full:
            return
        table = span.tables[0]
        self.pool.fill(table[first : blocks_for(end, size)])
        if self._prefix is None or first == full:
            return
        extend_hashes(span.hashes, span.ids, size, hash_seed)
        for block in range(first, full):
            self._prefix.insert(span.hashes[block], table[block])

    def fork(self, prompt: Span, spans: Sequence[Span]) -> None:
        """Pass the blocks of a computed prompt on to the spans that continue it; `prompt` is left without.

        The first takes them all. The others hold its whole blocks too, and compute a partial last block's ids anew.
        """
        if list(spans) == [prompt]:
            return
        size, table = self._block_tokens, prompt.tables[0]
        whole = prompt.computed // size
        for span in spans[1:]:
            self.pool.ref(table[:whole])
            span.tables[0][:] = table[:whole]
            span.computed = whole * size
            span.hashes[:] = prompt.hashes[:whole]
        if spans:
            first = spans[0]
            first.tables[0][:], first.computed = table, prompt.computed
            first.hashes[:] = prompt.hashes[:whole]
            table.clear()
        self.release(prompt)

    def release(self, span: Span) -> None:
        """Give all of its blocks back, leaves first."""
        for table in span.tables:
            self.pool.free(reversed(table))
            table.clear()
        span.computed = 0
