// Attention of one query token a row over paged KV in bfloat16: scores of 16 keys at a time by dot products along the head
// dimension, summed by a tree of shuffles; V by dot products of two tokens at a time. The query heads that share a KV head go
// together, so that K and V are read once for all of them. Tiles of keys pass with an online softmax (FlashAttention,
// arXiv:2205.14135). Scores and sums are float32; weights are rounded to bfloat16 before they meet V, as torch's SDPA does.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "ahead.h"
#include "lanes.h"

namespace splitserve {

// Lane i of the result is the sum of all lanes of x[i].
inline __m512 sums_of_16(const __m512 (&x)[16]) {
  __m512 a[8], b[4], c[2];
  unrolled<8>([&](auto i) {  // lanes of each quarter: x[2i] pair sums interleaved with x[2i+1]'s
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  });
  unrolled<4>([&](auto i) {
    const __m512d lo = _mm512_castps_pd(a[2 * i]), hi = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)), _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
  });
  unrolled<2>([&](auto i) {  // quarters 0+1, 2+3 of b[2i], then of b[2i+1]
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  });
  return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// What the heads of a span are worked on in, a row a query head; `fresh` has room for a tile.
struct Rows {
  int64_t stride = 0;
  std::vector<float> scores, out, top, total, shrink;
  std::vector<bf16> weights;

  void fresh(int64_t rows, int64_t keys, int64_t dim) {
    stride = keys;
    if (static_cast<int64_t>(scores.size()) < rows * keys) scores.resize(rows * keys), weights.resize(rows * keys);
    out.assign(rows * dim, 0.0f);
    top.assign(rows, kHidden);
    total.assign(rows, 0.0f);
    shrink.assign(rows, 0.0f);
  }
};

// Scores of a query against the 16 keys at `k`.
inline void score_16(const bf16* query, const bf16* k, int64_t dim, float scale, float* scores) {
  __m512 sum[kLanes];
  unrolled<kLanes>([&](auto i) { sum[i] = _mm512_setzero_ps(); });
  for (int64_t d = 0; d < dim; d += 2 * kLanes) {
    const __m512bh q = (__m512bh)_mm512_loadu_si512(query + d);
    unrolled<kLanes>([&](auto i) { sum[i] = _mm512_dpbf16_ps(sum[i], q, (__m512bh)_mm512_loadu_si512(k + i * dim + d)); });
  }
  _mm512_storeu_ps(scores, _mm512_mul_ps(sums_of_16(sum), _mm512_set1_ps(scale)));
}

// Adds the V rows of a tile and KV head, by the weights of G query heads, to `out` [G, Dv] as it shrinks: U times 32 columns
// from `column` on. Two tokens go at a time, in pairs of bfloat16; sums stand in the order that unpacking leaves, see `ordered`.
template <int G, int U>
void weigh(const Step& s, const Span& span, const KeyTile& tile, int64_t head, const bf16* weights, int64_t stride,
           int64_t column, const float* shrink, float* out, Ahead& ahead) {
  __m512 low[G][U], high[G][U];
  for (int g = 0; g < G; g++)
    for (int u = 0; u < U; u++) {
      const float* had = out + g * s.v.dim + column + 32 * u;
      low[g][u] = _mm512_mul_ps(_mm512_loadu_ps(had), _mm512_set1_ps(shrink[g]));
      high[g][u] = _mm512_mul_ps(_mm512_loadu_ps(had + kLanes), _mm512_set1_ps(shrink[g]));
    }
  for (int64_t t = tile.from; t < tile.to;) {
    const int64_t block = t / s.block_tokens, stop = std::min(tile.to, (block + 1) * s.block_tokens);
    const bf16* row = s.v.at(span.blocks[block], head) + t % s.block_tokens * s.v.dim + column;
    ahead.weighs((stop - t) * U, G);
    for (; t < stop; t += 2, row += 2 * s.v.dim) {
      const bool both = t + 1 < stop;  // past the query a block may hold anything
      for (int u = 0; u < U; u++) {
        const __m512i even = _mm512_loadu_si512(row + 32 * u);
        const __m512i odd = both ? _mm512_loadu_si512(row + s.v.dim + 32 * u) : _mm512_setzero_si512();
        const __m512bh x = (__m512bh)_mm512_unpacklo_epi16(even, odd), y = (__m512bh)_mm512_unpackhi_epi16(even, odd);
        for (int g = 0; g < G; g++) {
          int32_t pair;
          std::memcpy(&pair, weights + g * stride + t - tile.from, sizeof(pair));
          const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
          low[g][u] = _mm512_dpbf16_ps(low[g][u], w, x);
          high[g][u] = _mm512_dpbf16_ps(high[g][u], w, y);
        }
      }
    }
  }
  for (int g = 0; g < G; g++)
    for (int u = 0; u < U; u++) {
      float* to = out + g * s.v.dim + column + 32 * u;
      _mm512_storeu_ps(to, low[g][u]);
      _mm512_storeu_ps(to + kLanes, high[g][u]);
    }
}

// Columns 0 to 15 (half 0) or 16 to 31 of what `weigh` left: quarters of four columns, in turn of its low and high sums.
inline __m512 ordered(const float* sums, int half) {
  const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  return _mm512_permutex2var_ps(_mm512_loadu_ps(sums), _mm512_add_epi32(quarters, _mm512_set1_epi32(8 * half)),
                                _mm512_loadu_ps(sums + kLanes));
}

// Weights of row r over a tile from its scores; what was summed before shrinks to the new maximum.
inline void soften(const Span& span, const KeyTile& tile, Rows& rows, int64_t r) {
  float* line = rows.scores.data() + r * rows.stride;
  const int64_t length = tile.to - tile.from, padded = tile.padded();
  if (span.seen > tile.from) std::fill(line, line + (span.seen - tile.from), kHidden);
  std::fill(line + length, line + padded, kHidden);
  __m512 top = _mm512_set1_ps(rows.top[r]), sum = _mm512_setzero_ps();
  for (int64_t t = 0; t < padded; t += kLanes) top = _mm512_max_ps(top, _mm512_loadu_ps(line + t));
  const float best = _mm512_reduce_max_ps(top);
  for (int64_t t = 0; t < padded; t += kLanes) {
    const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(line + t), _mm512_set1_ps(best));
    const __m512 w = exp2_lanes(_mm512_mul_ps(below, _mm512_set1_ps(kLog2E)));
    narrow(rows.weights.data() + r * rows.stride + t, w);
    sum = _mm512_add_ps(sum, w);
  }
  rows.shrink[r] = std::exp(rows.top[r] - best);
  rows.top[r] = best;
  rows.total[r] = rows.total[r] * rows.shrink[r] + _mm512_reduce_add_ps(sum);
}

// Calls `run` with the number of heads, four at most, and the first of them, until a group is through.
template <class Run>
void by_heads(int64_t group, const Run& run) {
  int64_t g = 0;
  for (; g + 4 <= group; g += 4) run(std::integral_constant<int, 4>(), g);
  switch (group - g) {
    case 3: run(std::integral_constant<int, 3>(), g); break;
    case 2: run(std::integral_constant<int, 2>(), g); break;
    case 1: run(std::integral_constant<int, 1>(), g); break;
  }
}

inline void score_tile(const Step& s, const Span& span, const KeyTile& tile, Rows& rows, Ahead& ahead) {
  const bf16* query = s.query + s.query_start[span.row] * s.query_token + span.head * s.group * s.query_head;
  const int64_t together = ahead.heads();
  ahead.reading(span, tile);
  for (int64_t t = tile.from; t < tile.to; t += kLanes)
    for (int64_t h = 0; h < span.heads; h++) {
      const bf16* k = s.k.at(span.blocks[t / s.block_tokens], span.head + h) + t % s.block_tokens * s.k.dim;
      for (int64_t r = h * s.group, end = r + s.group; r < end;) {
        const int64_t some = std::min(together, end - r);
        ahead.scores(some);
        for (const int64_t stop = r + some; r < stop; r++)
          score_16(query + r * s.query_head, k, s.k.dim, s.scale, rows.scores.data() + r * rows.stride + t - tile.from);
      }
    }
}

inline void weigh_tile(const Step& s, const Span& span, const KeyTile& tile, Rows& rows, Ahead& ahead) {
  for (int64_t h = 0; h < span.heads; h++)
    by_heads(s.group, [&](auto count, int64_t g) {
      constexpr int G = count();
      const int64_t r = h * s.group + g;
      const bf16* weights = rows.weights.data() + r * rows.stride;
      float* out = rows.out.data() + r * s.v.dim;
      int64_t column = 0;
      for (; column + 64 <= s.v.dim; column += 64)
        weigh<G, 2>(s, span, tile, span.head + h, weights, rows.stride, column, &rows.shrink[r], out, ahead);
      for (; column < s.v.dim; column += 32)
        weigh<G, 1>(s, span, tile, span.head + h, weights, rows.stride, column, &rows.shrink[r], out, ahead);
    });
}

inline void decode(const Step& s, const Span& span, Rows& rows, Ahead& ahead) {
  const int64_t heads = span.heads * s.group;
  rows.fresh(heads, (KeyTile::blocks(s) * s.block_tokens + kLanes - 1) / kLanes * kLanes, s.v.dim);
  for (KeyTile tile(s, span, span.begin);; tile = KeyTile(s, span, tile.to)) {
    score_tile(s, span, tile, rows, ahead);
    for (int64_t r = 0; r < heads; r++) soften(span, tile, rows, r);
    weigh_tile(s, span, tile, rows, ahead);
    if (tile.to > span.position) break;
  }
  for (int64_t r = 0; r < heads; r++) {
    const __m512 inverse = _mm512_set1_ps(1.0f / rows.total[r]);
    for (int64_t d = 0; d < s.v.dim; d += kLanes) {
      const float* sums = rows.out.data() + r * s.v.dim + d / 32 * 32;
      narrow(s.out.at(s.query_start[span.row], (span.head * s.group + r) * s.v.dim + d),
             _mm512_mul_ps(ordered(sums, d % 32 / kLanes), inverse));
    }
  }
}

inline void run_decodes(const Step& s, int64_t decodes) {
  at::parallel_for(0, decodes * s.kv_heads, 1, [&](int64_t begin, int64_t end) {
    Rows rows;
    Ahead ahead(s, begin, end);
    for (int64_t i = begin; i < end;) {
      const Span span(s, i, end);
      decode(s, span, rows, ahead);
      i += span.heads;
    }
  });
}

}  // namespace splitserve
