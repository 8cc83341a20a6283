// Where queries, keys and values of a step are: block tables over a pool.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "gemm.h"

namespace splitserve {

// One layer's pool: a head's run in a block is `tokens` rows of `dim`.
struct Pool {
  bf16* data;
  int64_t block_stride, head_stride, dim;
  bf16* at(int64_t block, int64_t head) const { return data + block * block_stride + head * head_stride; }
};

// Where attention of [T, Hq * Dv] goes: by rows, or in the tiles that a product reads. Sixteen elements are adjacent.
struct Out {
  bf16* data;
  int64_t width;
  bool tiled;
  bf16* at(int64_t token, int64_t column) const {
    if (!tiled) return data + token * width + column;
    return Tiles{data, width}.at(token, column);
  }
};

struct Step {
  const int64_t *query_start, *kv_len, *table;  // [S + 1], [S], [S, M]
  int64_t rows, table_width, block_tokens;
  int64_t heads, kv_heads, group;
  float scale;
  int64_t window;  // 0: all
  const bf16* query;
  int64_t query_token, query_head;  // strides
  Out out;
  Pool k, v;

  int64_t first_seen(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
  const int64_t* blocks(int64_t row) const { return table + row * table_width; }
};

// Where a step's tokens stand; tensors of int64 as in `engine/attention/base.ForwardContext`.
struct Places {
  const int64_t *query_start, *kv_len, *table, *slots;
  int64_t rows, table_width, decodes;
};

// A step's places and pools; the rest is its layer's.
inline Step step_over(const Places& places, const Pool& k, const Pool& v, int64_t block_tokens, int64_t heads, int64_t kv_heads) {
  Step s;
  s.query_start = places.query_start;
  s.kv_len = places.kv_len;
  s.table = places.table;
  s.rows = places.rows;
  s.table_width = places.table_width;
  s.block_tokens = block_tokens;
  s.heads = heads;
  s.kv_heads = kv_heads;
  s.group = heads / kv_heads;
  s.k = k;
  s.v = v;
  return s;
}

// A pool [N, H, B, D] as it is stored.
inline Pool pool_of(const at::Tensor& pool) {
  TORCH_CHECK(pool.dim() == 4 && pool.scalar_type() == at::kBFloat16 && pool.stride(3) == 1, "pool: wants bfloat16 [N, H, B, D]");
  return Pool{pool.data_ptr<bf16>(), pool.stride(0), pool.stride(1), pool.size(3)};
}

}  // namespace splitserve
