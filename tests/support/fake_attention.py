"""FlashInfer's wrappers and FlashAttention's function as their documentation has them, in plain torch: what our backends
give them is checked and answered without a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window_left: int, softcap: float
) -> torch.Tensor:
    """`q [n, Hq, D]` are the last of `k`, `v` `[L, H, D]`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    hidden = (distance < 0) | ((distance > window_left) & (window_left >= 0))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v).to(q.dtype)


class _Wrapper:
    def __init__(self, workspace: torch.Tensor, kv_layout: str, **options: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert not workspace.any()
        assert kv_layout == "HND"
        self._buffers = tuple(options.get(f"paged_kv_{name}_buffer") for name in ("indptr", "indices", "last_page_len"))
        self._captured = options.get("use_cuda_graph", False)
        self._planned: dict[str, Any] | None = None

    def _plan(
        self, starts: torch.Tensor, pages: tuple[torch.Tensor, ...], heads: int, kv_heads: int, dim: int, page: int,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        assert all(tensor.dtype == torch.int32 and tensor.device.type == "cpu" for tensor in (starts, *pages))
        indptr, indices, last = pages
        assert len(indptr) == len(last) + 1 == len(starts)
        assert int(indptr[-1]) == len(indices)
        assert ((last >= 1) & (last <= page)).all()
        if self._captured:  # the kernels of a graph read what lies in its buffers
            for buffer, tensor in zip(self._buffers, pages):
                assert buffer is not None
                buffer[: len(tensor)].copy_(tensor)
            pages = tuple(buffer for buffer in self._buffers if buffer is not None)
        self._planned = {"starts": starts, "pages": pages, "shape": (heads, kv_heads, dim, page), **options}

    def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert self._planned is not None, "run before plan"
        plan = self._planned
        heads, kv_heads, dim, page = plan["shape"]
        assert q.is_contiguous()
        assert q.shape[1:] == (heads, dim)
        assert q.dtype == plan["q_data_type"]
        assert kv[0].stride() == kv[1].stride()
        assert kv[0].shape[1:] == (kv_heads, page, dim)
        out: list[torch.Tensor] = []
        indptr, indices, last = (tensor.tolist() for tensor in plan["pages"])
        starts = plan["starts"].tolist()
        for row in range(len(starts) - 1):
            blocks = indices[indptr[row] : indptr[row + 1]]
            length = (len(blocks) - 1) * page + last[row]
            k, v = (part[blocks].transpose(1, 2).flatten(0, 1)[:length] for part in kv)
            softcap = plan["logits_soft_cap"] or 0.0
            queries = q[starts[row] : starts[row + 1]]
            out.append(_attend(queries, k, v, plan["sm_scale"], plan["window_left"], softcap))
        return torch.cat(out)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, **options: Any,
    ) -> None:  # fmt: skip
        starts = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        pages = (indptr, indices, last_page_len)
        self._plan(starts, pages, num_qo_heads, num_kv_heads, head_dim, page_size, options)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int,
        *, causal: bool, **options: Any,
    ) -> None:  # fmt: skip
        assert causal
        pages = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._plan(qo_indptr, pages, num_qo_heads, num_kv_heads, head_dim_qk, page_size, options)


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, softmax_scale: float, causal: bool, window_size: tuple[int, int],
    softcap: float, block_table: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    assert causal
    assert {x.dtype for x in (cu_seqlens_q, cu_seqlens_k, block_table)} == {torch.int32}
    assert k.shape[1] % 256 == 0
    assert q.is_contiguous()
    assert k.stride(-1) == v.stride(-1) == 1
    starts, lengths = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    assert max_seqlen_q == max(int(n) for n in cu_seqlens_q.diff())
    assert max_seqlen_k == max(lengths)
    out: list[torch.Tensor] = []
    for row, length in enumerate(lengths):
        blocks = block_table[row, : -(-length // k.shape[1])].tolist()
        keys, values = (part[blocks].flatten(0, 1)[:length] for part in (k, v))
        out.append(_attend(q[starts[row] : starts[row + 1]], keys, values, softmax_scale, window_size[0], softcap))
    return torch.cat(out)
