"""A step's block tables in the form that FlashInfer and FlashAttention read. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitserve.engine.attention.base import ForwardContext


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Each row's blocks one after another; all int32. Row s has `indices[indptr[s] : indptr[s + 1]]`, all full but the
    last, which holds `last_len[s]` tokens (1 to a block's)."""

    indptr: NDArray[np.int32]  # [S + 1]
    indices: NDArray[np.int32]
    last_len: NDArray[np.int32]  # [S]


def pages_of(context: ForwardContext, block_tokens: int) -> Pages:
    """The blocks that hold the first `kv_len` tokens of each row, this step's own included."""
    table = context.block_tables[0]
    counts = -(-context.kv_len // block_tokens)
    used = np.arange(table.shape[1]) < counts[:, None]
    return Pages(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        table[used].astype(np.int32),
        (context.kv_len - (counts - 1) * block_tokens).astype(np.int32),
    )
