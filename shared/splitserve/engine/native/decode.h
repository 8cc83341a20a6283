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

#include "lanes.h"
#include "paged.h"

namespace splitserve {

constexpr int64_t kTileBytes = 128 << 10;  // of K: as much of V follows, and the next K, into an L2 of a megabyte

// Lane i of the result is the sum of all lanes of x[i].
inline __m512 sums_of_16(__m512 x[16]) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; i++)  // lanes of each quarter: x[2i] pair sums interleaved with x[2i+1]'s
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d lo = _mm512_castps_pd(a[2 * i]), hi = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)), _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
  }
  for (int i = 0; i < 2; i++)  // quarters 0+1, 2+3 of b[2i], then of b[2i+1]
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// The KV heads [head, head + heads) of one query token: worked on together, as a block holds their runs one after another and
// long runs come from memory faster than short ones.
struct Span {
  int64_t row, head, heads;
  int64_t position;     // of the query
  int64_t seen, begin;  // the first key with weight, and the first of its sixteen
  const int64_t* blocks;

  Span(const Step& s, int64_t index, int64_t end)
      : row(index / s.kv_heads),
        head(index % s.kv_heads),
        heads(std::min(s.kv_heads - head, end - index)),
        position(s.kv_len[row] - 1),
        seen(s.first_seen(position)),
        begin(seen / kLanes * kLanes),
        blocks(s.blocks(row)) {}
};

// Keys [from, to) of a span, up to the end of a block. How many blocks are a tile depends on the model alone: its borders round
// sums, and an answer may depend neither on the rows beside it nor on how many threads share its heads.
struct KeyTile {
  int64_t from, to;

  KeyTile(const Step& s, const Span& span, int64_t from)
      : from(from), to(std::min(span.position + 1, (from / s.block_tokens + blocks(s)) * s.block_tokens)) {}
  int64_t padded() const { return (to - from + kLanes - 1) / kLanes * kLanes; }
  static int64_t blocks(const Step& s) {
    const int64_t bytes = s.kv_heads * s.block_tokens * s.k.dim * static_cast<int64_t>(sizeof(bf16));
    return std::max<int64_t>(1, kTileBytes / bytes);
  }
};

// Asks for the runs of a tile in one pool, a few lines at a time: the hardware finds no order in a block table, and a core that
// asks for many lines at once waits for the first ones to come.
class Ahead {
 public:
  Ahead(const Step& s, const Pool& pool, const Span& span, const KeyTile& tile)
      : pool_(pool),
        head_(span.head),
        bytes_(span.heads * pool.head_stride * static_cast<int64_t>(sizeof(bf16))),
        block_(span.blocks + tile.from / s.block_tokens),
        last_(span.blocks + (tile.to - 1) / s.block_tokens) {
    enter();
  }
  void ask(int64_t lines) {
    for (; lines > 0 && block_ <= last_; lines--) {
      _mm_prefetch(next_, _MM_HINT_T1);
      next_ += 64;
      if (next_ < stop_) continue;
      if (++block_ <= last_) enter();
    }
  }

 private:
  void enter() {
    next_ = reinterpret_cast<const char*>(pool_.at(*block_, head_));
    stop_ = next_ + bytes_;
  }
  const Pool& pool_;
  int64_t head_, bytes_;
  const int64_t *block_, *last_;
  const char *next_, *stop_;
};

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

// Scores of G query heads, the first at `query`, against 16 keys of their head at `k`: `scores` [G, stride].
template <int G>
void score(const Step& s, const bf16* query, const bf16* k, float* scores, int64_t stride, Ahead& ahead) {
  const int64_t lines = s.v.dim / (G * s.k.dim / 16) + 1;
  for (int g = 0; g < G; g++) {
    __m512 sum[kLanes];
    for (auto& x : sum) x = _mm512_setzero_ps();
    for (int64_t d = 0; d < s.k.dim; d += 2 * kLanes) {
      ahead.ask(lines);
      const __m512bh q = (__m512bh)_mm512_loadu_si512(query + g * s.query_head + d);
      for (int64_t i = 0; i < kLanes; i++)
        sum[i] = _mm512_dpbf16_ps(sum[i], q, (__m512bh)_mm512_loadu_si512(k + i * s.k.dim + d));
    }
    _mm512_storeu_ps(scores + g * stride, _mm512_mul_ps(sums_of_16(sum), _mm512_set1_ps(s.scale)));
  }
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
  const int64_t lines = (s.k.dim + 15) / 16 * 32 * U / s.v.dim;
  for (int64_t t = tile.from; t < tile.to;) {
    const int64_t block = t / s.block_tokens, stop = std::min(tile.to, (block + 1) * s.block_tokens);
    const bf16* row = s.v.at(span.blocks[block], head) + t % s.block_tokens * s.v.dim + column;
    for (; t < stop; t += 2, row += 2 * s.v.dim) {
      ahead.ask(lines);
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
    const __m512 w = exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(line + t), _mm512_set1_ps(best)));
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

inline void score_tile(const Step& s, const Span& span, const KeyTile& tile, Rows& rows) {
  const bf16* query = s.query + s.query_start[span.row] * s.query_token + span.head * s.group * s.query_head;
  Ahead ahead(s, s.v, span, tile);
  for (int64_t t = tile.from; t < tile.to; t += kLanes)
    for (int64_t h = 0; h < span.heads; h++) {
      const bf16* k = s.k.at(span.blocks[t / s.block_tokens], span.head + h) + t % s.block_tokens * s.k.dim;
      by_heads(s.group, [&](auto count, int64_t g) {
        const int64_t r = h * s.group + g;
        score<count()>(s, query + r * s.query_head, k, rows.scores.data() + r * rows.stride + t - tile.from, rows.stride, ahead);
      });
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

// `next`: the span after this one, or this one again where there is none.
inline void decode(const Step& s, const Span& span, const Span& next, Rows& rows) {
  const int64_t heads = span.heads * s.group;
  rows.fresh(heads, (KeyTile::blocks(s) * s.block_tokens + kLanes - 1) / kLanes * kLanes, s.v.dim);
  for (KeyTile tile(s, span, span.begin);;) {
    score_tile(s, span, tile, rows);
    for (int64_t r = 0; r < heads; r++) soften(span, tile, rows, r);
    const bool last = tile.to > span.position;
    const KeyTile then = last ? KeyTile(s, next, next.begin) : KeyTile(s, span, tile.to);
    Ahead ahead(s, s.k, last ? next : span, then);
    weigh_tile(s, span, tile, rows, ahead);
    if (last) break;
    tile = then;
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
    for (int64_t i = begin; i < end;) {
      const Span span(s, i, end);
      i += span.heads;
      decode(s, span, i < end ? Span(s, i, end) : span, rows);
    }
  });
}

}  // namespace splitserve
