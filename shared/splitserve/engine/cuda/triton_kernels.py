"""Decode attention over paged KV as Triton kernels: each part of a sequence's keys by one program, then the parts joined.

Splitting the keys keeps a GPU busy at small batches (Flash-Decoding: Dao, Haziza, Massa, Sizov 2023); the online softmax is
Milakov's and Gimelshein's. Imported only where Triton is installed.
"""
# ruff: noqa: N803  # constants of a kernel are in capitals
# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_part(
    query,  # [S, Hq, Dk]
    keys,  # [blocks, H, B, Dk]
    values,  # [blocks, H, B, Dv]
    tables,  # i64 [S, M]
    kv_len,  # i64 [S]
    out,  # f32 [S, Hq, PARTS, Dv]
    log_sum,  # f32 [S, Hq, PARTS]: log of the sum of exp(score)
    scale,
    query_row,
    query_head,
    key_block,
    key_head,
    key_token,
    value_block,
    value_head,
    value_token,
    table_row,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    K_DIM: tl.constexpr,
    K_PADDED: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # 0.0: none
):
    """Program (row, KV head, part)."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(kv_len + row)
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    else:
        first = 0
    share = tl.cdiv(tl.cdiv(length - first, PARTS), TILE) * TILE
    begin = first + part * share
    end = tl.minimum(begin + share, length)

    member = tl.arange(0, GROUP_PADDED)
    k_dim = tl.arange(0, K_PADDED)
    v_dim = tl.arange(0, V_PADDED)
    in_group = member < GROUP
    q_head = head * GROUP + member
    q = tl.load(
        query + row * query_row + q_head[:, None] * query_head + k_dim[None, :],
        mask=in_group[:, None] & (k_dim < K_DIM)[None, :],
        other=0.0,
    )
    best = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    acc = tl.zeros([GROUP_PADDED, V_PADDED], tl.float32)
    for start in range(begin, end, TILE):
        position = start + tl.arange(0, TILE)
        seen = position < end
        block = tl.load(tables + row * table_row + position // BLOCK, mask=seen, other=0)
        offset = position % BLOCK
        k_at = block * key_block + head * key_head + offset * key_token
        k = tl.load(keys + k_at[None, :] + k_dim[:, None], mask=seen[None, :] & (k_dim < K_DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP > 0.0:
            scores = SOFTCAP * (2.0 * tl.sigmoid(2.0 * scores / SOFTCAP) - 1.0)  # tanh
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        v_at = block * value_block + head * value_head + offset * value_token
        v = tl.load(values + v_at[:, None] + v_dim[None, :], mask=seen[:, None] & (v_dim < V_DIM)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher

    some = total > 0.0  # a part may have no key at all
    total = tl.where(some, total, 1.0)
    acc = acc / total[:, None]
    at = (row * tl.num_programs(1) * GROUP + q_head) * PARTS + part
    tl.store(log_sum + at, tl.where(some, best + tl.log(total), float("-inf")), mask=in_group)
    tl.store(out + at[:, None] * V_DIM + v_dim[None, :], acc, mask=in_group[:, None] & (v_dim < V_DIM)[None, :])


@triton.jit
def join_parts(
    parts,  # f32 [S, Hq, PARTS, Dv]
    log_sum,  # f32 [S, Hq, PARTS]
    sinks,  # f32 [Hq], read where HAS_SINKS
    out,  # [S, Hq, Dv]
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Program (row, query head). A sink takes weight and gives no value."""
    row, head = tl.program_id(0), tl.program_id(1)
    at = row * tl.num_programs(1) + head
    part = tl.arange(0, PARTS)
    dim = tl.arange(0, V_PADDED)
    logs = tl.load(log_sum + at * PARTS + part)
    highest = tl.max(logs, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head)
        highest = tl.maximum(highest, sink)
    weights = tl.exp(logs - highest)
    total = tl.sum(weights, 0)
    if HAS_SINKS:
        total += tl.exp(sink - highest)
    values = tl.load(
        parts + (at * PARTS + part)[:, None] * V_DIM + dim[None, :], mask=(dim < V_DIM)[None, :], other=0.0
    )
    joined = tl.sum(values * weights[:, None], 0) / total
    tl.store(out + at * V_DIM + dim, joined.to(out.dtype.element_ty), mask=dim < V_DIM)
