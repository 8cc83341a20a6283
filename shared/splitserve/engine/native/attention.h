// Attention over paged KV in bfloat16, for x86 with AVX512_BF16 (and AMX where oneDNN finds it).
//
// Blocks hold a head's run as [token][dim], 16 tokens or a multiple of it. Two shapes of work:
//   decode   one query token a row: scores of 16 keys at a time by dot products along the head dimension, summed by a tree
//            of shuffles; the query heads that share a KV head go together, so that K and V are read once for all of them.
//   chunk    many query tokens a row: keys and values are laid out in pairs once a step (what oneDNN's block kernel reads),
//            then tiles of query rows pass over tiles of keys with an online softmax (FlashAttention, arXiv:2205.14135).
// Scores and sums are float32; weights are rounded to bfloat16 before they meet V in a chunk, as torch's SDPA does.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"
#include "lanes.h"

namespace splitserve {

constexpr int64_t kKeys = 128;  // keys of a tile

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

// Asks for a run that will be needed, a part at a time: the hardware finds no order in a block table, and a core that asks for
// many lines at once waits for the first ones to come.
class Ahead {
 public:
  Ahead(const bf16* run, int64_t elements, int64_t parts)
      : next_(reinterpret_cast<const char*>(run)), end_(next_ + elements * sizeof(bf16)), part_((end_ - next_) / parts + 1) {}
  void ask() {
    for (const char* stop = std::min(end_, next_ + part_); next_ < stop; next_ += 64) _mm_prefetch(next_, _MM_HINT_T1);
  }

 private:
  const char *next_, *end_;
  int64_t part_;
};

// One query token and KV head: its keys are blocks [first, last] of the row's table.
struct Task {
  int64_t row, head;
  int64_t position;     // of the query
  int64_t seen, begin;  // the first key with weight, and the first of its sixteen
  const int64_t* blocks;
  int64_t first, last;

  Task(const Step& s, int64_t index)
      : row(index / s.kv_heads),
        head(index % s.kv_heads),
        position(s.kv_len[row] - 1),
        seen(s.first_seen(position)),
        begin(seen / kLanes * kLanes),
        blocks(s.blocks(row)),
        first(begin / s.block_tokens),
        last(position / s.block_tokens) {}
};

// Weights of G query heads over the task's V rows into G x 64 (or 32) sums of `out`, stride `ld`.
template <int G, int V>
void weigh(const Step& s, const Task& task, const Task& next, const float* weights, int64_t weight_stride, int64_t dim0,
           float* out, int64_t ld) {
  __m512 sum[G][V];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < V; i++) sum[g][i] = _mm512_setzero_ps();
  for (int64_t t = task.begin, block = task.first; block <= task.last; block++) {
    const int64_t offset = t % s.block_tokens, stop = std::min(task.position + 1, (block + 1) * s.block_tokens);
    const bf16* row = s.v.at(task.blocks[block], task.head) + offset * s.v.dim + dim0;
    const int64_t then = std::min(next.first + block - task.first, next.last);
    Ahead ahead(s.k.at(next.blocks[then], next.head), dim0 ? 0 : s.block_tokens * s.k.dim, s.block_tokens);
    for (; t < stop; t++, row += s.v.dim) {
      ahead.ask();
      __m512 x[V];
      for (int i = 0; i < V; i++) x[i] = widen(row + i * kLanes);
      for (int g = 0; g < G; g++) {
        const __m512 w = _mm512_set1_ps(weights[g * weight_stride + t - task.begin]);
        for (int i = 0; i < V; i++) sum[g][i] = _mm512_fmadd_ps(w, x[i], sum[g][i]);
      }
    }
  }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < V; i++) _mm512_storeu_ps(out + g * ld + dim0 + i * kLanes, sum[g][i]);
}

// Scores of G query heads against the task's keys: scores[g][padded].
template <int G>
void score(const Step& s, const Task& task, int64_t g0, int64_t padded, float* scores) {
  const bf16* query = s.query + s.query_start[task.row] * s.query_token + (task.head * s.group + g0) * s.query_head;
  for (int64_t t = 0; t < padded; t += kLanes) {
    const int64_t at = task.begin + t, block = at / s.block_tokens, offset = at % s.block_tokens;
    const bf16* k = s.k.at(task.blocks[block], task.head) + offset * s.k.dim;
    Ahead ahead(s.v.at(task.blocks[block], task.head) + offset * s.v.dim, kLanes * s.v.dim, G * s.k.dim / (2 * kLanes));
    for (int g = 0; g < G; g++) {
      __m512 sum[kLanes];
      for (auto& x : sum) x = _mm512_setzero_ps();
      for (int64_t d = 0; d < s.k.dim; d += 2 * kLanes) {
        ahead.ask();
        const __m512bh q = (__m512bh)_mm512_loadu_si512(query + g * s.query_head + d);
        for (int64_t i = 0; i < kLanes; i++)
          sum[i] = _mm512_dpbf16_ps(sum[i], q, (__m512bh)_mm512_loadu_si512(k + i * s.k.dim + d));
      }
      _mm512_storeu_ps(scores + g * padded + t, _mm512_mul_ps(sums_of_16(sum), _mm512_set1_ps(s.scale)));
    }
  }
}

template <int G>
void decode_heads(const Step& s, const Task& task, const Task& next, int64_t g0, std::vector<float>& buffer) {
  const int64_t length = task.position + 1 - task.begin, padded = (length + kLanes - 1) / kLanes * kLanes;
  if (static_cast<int64_t>(buffer.size()) < G * padded) buffer.resize(G * padded);
  float* scores = buffer.data();
  score<G>(s, task, g0, padded, scores);
  alignas(64) float out[G * 256];
  float total[G];
  for (int g = 0; g < G; g++) {
    float* line = scores + g * padded;
    std::fill(line, line + (task.seen - task.begin), kHidden);
    std::fill(line + length, line + padded, kHidden);
    __m512 top = _mm512_set1_ps(kHidden), sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < padded; t += kLanes) top = _mm512_max_ps(top, _mm512_loadu_ps(line + t));
    const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t t = 0; t < padded; t += kLanes) {
      const __m512 w = exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(line + t), highest));
      _mm512_storeu_ps(line + t, w);
      sum = _mm512_add_ps(sum, w);
    }
    total[g] = _mm512_reduce_add_ps(sum);
  }
  int64_t d = 0;
  for (; d + 64 <= s.v.dim; d += 64) weigh<G, 4>(s, task, next, scores, padded, d, out, s.v.dim);
  for (; d < s.v.dim; d += 32) weigh<G, 2>(s, task, next, scores, padded, d, out, s.v.dim);
  for (int g = 0; g < G; g++) {
    const int64_t column = (task.head * s.group + g0 + g) * s.v.dim;
    const __m512 inverse = _mm512_set1_ps(1.0f / total[g]);
    for (int64_t i = 0; i < s.v.dim; i += kLanes)
      narrow(s.out.at(s.query_start[task.row], column + i),
             _mm512_mul_ps(_mm512_loadu_ps(out + g * s.v.dim + i), inverse));
  }
}

inline void decode(const Step& s, const Task& task, const Task& next, std::vector<float>& scores) {
  int64_t g = 0;
  for (; g + 4 <= s.group; g += 4) decode_heads<4>(s, task, next, g, scores);
  switch (s.group - g) {
    case 3: decode_heads<3>(s, task, next, g, scores); break;
    case 2: decode_heads<2>(s, task, next, g, scores); break;
    case 1: decode_heads<1>(s, task, next, g, scores); break;
  }
}

// A chunk's keys from `begin` (a multiple of 16) on, laid out as weights (gemm.h) in tiles of kKeys: K [keys, dim], V
// [dim, keys].
struct Chunk {
  int64_t row, start, stop;  // positions of its queries
  int64_t begin, tiles;      // keys
  bf16 *k, *v;               // [kv_heads][tiles][kKeys * dim]
};

// Keys past the chunk's end are zeros: they get no weight, and what is left in a block may be anything.
inline void pack_keys(const Step& s, const Chunk& c, int64_t head, int64_t tile) {
  const int64_t dim = s.k.dim;
  bf16* to = c.k + (head * c.tiles + tile) * kKeys * dim;
  const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(static_cast<int>(dim / 2)));
  for (int64_t t = 0; t < kKeys; t += kLanes) {
    const int64_t at = c.begin + tile * kKeys + t;
    bf16* half = to + t / kPanel * kPanel * dim + t % kPanel / 16 * kTile;
    const __mmask16 known = at >= c.stop ? 0 : c.stop - at >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (c.stop - at)) - 1);
    const bf16* k = known ? s.k.at(s.blocks(c.row)[at / s.block_tokens], head) + at % s.block_tokens * dim : nullptr;
    for (int64_t d = 0; d < dim; d += 2) {
      const __m512i pairs = known ? _mm512_i32gather_epi32(lanes, reinterpret_cast<const int*>(k + d), 4) : _mm512_setzero_si512();
      _mm512_store_si512(half + d / 32 * 2 * kTile + d % 32 / 2 * 32, _mm512_maskz_mov_epi32(known, pairs));
    }
  }
}

inline void pack_values(const Step& s, const Chunk& c, int64_t head, int64_t tile) {
  const int64_t dim = s.v.dim;
  bf16* to = c.v + (head * c.tiles + tile) * kKeys * dim;
  for (int64_t t = 0; t < kKeys; t += 2) {
    const int64_t at = c.begin + tile * kKeys + t;
    const bool first = at < c.stop, second = at + 1 < c.stop;  // block_tokens is even, so both are in the same run
    const bf16* v = first ? s.v.at(s.blocks(c.row)[at / s.block_tokens], head) + at % s.block_tokens * dim : nullptr;
    for (int64_t d = 0; d < dim; d += kLanes) {
      __m512i even = _mm512_setzero_si512(), odd = even;
      if (first) even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + d)));
      if (second) odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + dim + d)));
      bf16* pair = to + d / kPanel * kPanel * kKeys + (t / 32 * 2 + d % kPanel / 16) * kTile + t % 32 / 2 * 32;
      _mm512_store_si512(pair, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

// What a tile of kRowsAtOnce query rows is worked on in.
struct Scratch {
  alignas(64) bf16 query[kRowsAtOnce * 256];
  alignas(64) bf16 weights[kRowsAtOnce * kKeys];
  alignas(64) float scores[kKeys / kPanel][kRowsAtOnce * kPanel];
  alignas(64) float out[kRowsAtOnce * 256];
  alignas(64) float part[kRowsAtOnce * kPanel];
  alignas(64) float sum[kRowsAtOnce][kLanes];  // of weights, lane by lane
  alignas(64) float top[kRowsAtOnce], best[kRowsAtOnce], shrink[kRowsAtOnce];
};

// Keys [lo, hi) of a tile, as masks of its sixteens. `all`: nothing is hidden.
struct Seen {
  __mmask16 lanes[kKeys / kLanes];
  bool all;
  Seen(int64_t lo, int64_t hi) : all(lo <= 0 && hi >= kKeys) {
    if (all) return;
    for (int64_t i = 0; i < kKeys / kLanes; i++) {
      const int64_t first = lo - i * kLanes, last = hi - i * kLanes;
      const uint32_t below = last >= kLanes ? 0xffffu : last <= 0 ? 0u : (1u << last) - 1;
      const uint32_t above = first <= 0 ? 0xffffu : first >= kLanes ? 0u : 0xffffu << first;
      lanes[i] = static_cast<__mmask16>(below & above);
    }
  }
};

// The highest score of row r that it sees, kHidden where it sees none.
inline float highest(const Scratch& t, int64_t r, const Seen& seen) {
  __m512 top = _mm512_set1_ps(kHidden);
  for (int64_t i = 0; i < kKeys / kLanes; i++) {
    const float* scores = t.scores[i / 2] + r * kPanel + i % 2 * kLanes;
    top = seen.all ? _mm512_max_ps(top, _mm512_load_ps(scores))
                   : _mm512_mask_max_ps(top, seen.lanes[i], top, _mm512_load_ps(scores));
  }
  return _mm512_reduce_max_ps(top);
}

// Moves all rows' maxima from `top` to `best`: by how much what was summed so far shrinks. `scale` is in powers of two.
inline void shrink_all(Scratch& t, float scale) {
  for (int64_t r = 0; r < kRowsAtOnce; r += kLanes) {
    const __m512 top = _mm512_load_ps(t.top + r), best = _mm512_load_ps(t.best + r);
    const __mmask16 some = _mm512_cmp_ps_mask(best, _mm512_set1_ps(kHidden), _CMP_GT_OQ);  // else nothing is summed yet
    const __m512 by = _mm512_maskz_mul_ps(some, _mm512_sub_ps(top, best), _mm512_set1_ps(scale));
    _mm512_store_ps(t.shrink + r, exp2_lanes(by));
    _mm512_store_ps(t.top + r, best);
  }
}

// Weights of row r from its scores, added to its sums.
inline void soften(Scratch& t, int64_t r, const Seen& seen, float scale) {
  const Tiles weights{t.weights, kKeys};
  const __m512 factor = _mm512_set1_ps(scale), minus = _mm512_set1_ps(t.best[r] == kHidden ? 0.0f : t.best[r] * scale);
  __m512 total = _mm512_mul_ps(_mm512_load_ps(t.sum[r]), _mm512_set1_ps(t.shrink[r]));
  for (int64_t i = 0; i < kKeys / kLanes; i++) {
    const __m512 score = _mm512_load_ps(t.scores[i / 2] + r * kPanel + i % 2 * kLanes);
    __m512 w = exp2_lanes(_mm512_fmsub_ps(score, factor, minus));
    if (!seen.all) w = _mm512_maskz_mov_ps(seen.lanes[i], w);
    total = _mm512_add_ps(total, w);
    narrow(weights.at(r, i * kLanes), w);
  }
  _mm512_store_ps(t.sum[r], total);
}

// Query rows [r0, r1) of a chunk and KV head; row r is token r / group, head r % group of its group.
inline void chunk_tile(const Step& s, const Chunk& c, int64_t head, int64_t r0, int64_t r1, bool amx, Scratch& t) {
  const int64_t used = r1 - r0, token0 = s.query_start[c.row], dk = s.k.dim, dv = s.v.dim;
  const Tiles query{t.query, dk}, weights{t.weights, kKeys};
  const float scale = s.scale * 1.44269504f;
  for (int64_t r = 0; r < used; r++) {
    const int64_t token = token0 + (r0 + r) / s.group, h = head * s.group + (r0 + r) % s.group;
    for (int64_t d = 0; d < dk; d += 32)
      std::memcpy(query.at(r, d), s.query + token * s.query_token + h * s.query_head + d, 32 * sizeof(bf16));
  }
  std::fill(t.top, t.top + kRowsAtOnce, kHidden);
  std::fill(t.best, t.best + kRowsAtOnce, kHidden);
  std::memset(t.sum, 0, sizeof(t.sum));
  std::fill(t.out, t.out + used * dv, 0.0f);
  const int64_t newest = c.start + (r1 - 1) / s.group, oldest = s.first_seen(c.start + r0 / s.group);
  for (int64_t tile = (oldest - c.begin) / kKeys; c.begin + tile * kKeys <= newest; tile++) {
    const int64_t key0 = c.begin + tile * kKeys, panels = std::min(kKeys, newest + 1 - key0 + kPanel - 1) / kPanel;
    const bf16* k = c.k + (head * c.tiles + tile) * kKeys * dk;
    for (int64_t panel = 0; panel < panels; panel++)
      multiply(query, 0, used, k + panel * kPanel * dk, false, amx, t.scores[panel]);
    const auto seen = [&](int64_t r) {
      const int64_t position = c.start + (r0 + r) / s.group;
      return Seen(s.first_seen(position) - key0, position + 1 - key0);
    };
    for (int64_t r = 0; r < used; r++) t.best[r] = std::max(t.top[r], highest(t, r, seen(r)));
    shrink_all(t, scale);
    for (int64_t r = 0; r < used; r++) soften(t, r, seen(r), scale);
    for (int64_t panel = 0; panel < dv / kPanel; panel++) {
      multiply(weights, 0, used, c.v + ((head * c.tiles + tile) * dv + panel * kPanel) * kKeys, false, amx, t.part);
      for (int64_t r = 0; r < used; r++)
        for (int64_t i = 0; i < kPanel; i += kLanes) {
          float* to = t.out + r * dv + panel * kPanel + i;
          const __m512 had = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(t.shrink[r]));
          _mm512_storeu_ps(to, _mm512_add_ps(had, _mm512_load_ps(t.part + r * kPanel + i)));
        }
    }
  }
  for (int64_t r = 0; r < used; r++) {
    const int64_t token = token0 + (r0 + r) / s.group, h = head * s.group + (r0 + r) % s.group;
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(t.sum[r])));
    for (int64_t d = 0; d < dv; d += kLanes)
      narrow(s.out.at(token, h * dv + d), _mm512_mul_ps(_mm512_loadu_ps(t.out + r * dv + d), inverse));
  }
}

inline void run_decodes(const Step& s, int64_t decodes) {
  at::parallel_for(0, decodes * s.kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t i = begin; i < end; i++) decode(s, Task(s, i), Task(s, std::min(i + 1, end - 1)), scores);
  });
}

inline void run_chunks(const Step& s, int64_t decodes, bool amx, std::vector<bf16>& packed) {
  std::vector<Chunk> chunks;
  int64_t keys = 0;
  for (int64_t row = decodes; row < s.rows; row++) {
    const int64_t count = s.query_start[row + 1] - s.query_start[row];
    if (!count) continue;
    Chunk c{row, s.kv_len[row] - count, s.kv_len[row], 0, 0, nullptr, nullptr};
    c.begin = s.first_seen(c.start) / kLanes * kLanes;
    c.tiles = (c.stop - c.begin + kKeys - 1) / kKeys;
    keys += c.tiles * kKeys;
    chunks.push_back(c);
  }
  if (chunks.empty()) return;
  bf16* next = aligned(packed, keys * s.kv_heads * (s.k.dim + s.v.dim));
  for (auto& c : chunks) {
    c.k = next;
    c.v = c.k + s.kv_heads * c.tiles * kKeys * s.k.dim;
    next = c.v + s.kv_heads * c.tiles * kKeys * s.v.dim;
  }
  for (const auto& c : chunks) {
    at::parallel_for(0, s.kv_heads * c.tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        pack_keys(s, c, i / c.tiles, i % c.tiles);
        pack_values(s, c, i / c.tiles, i % c.tiles);
      }
    });
    const int64_t rows = (c.stop - c.start) * s.group, tiles = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    at::parallel_for(0, s.kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      if (amx) amx_begin();
      for (int64_t i = begin; i < end; i++) {
        const int64_t r0 = i % tiles * kRowsAtOnce;
        chunk_tile(s, c, i / tiles, r0, std::min(rows, r0 + kRowsAtOnce), amx, scratch);
      }
      if (amx) amx_end();
    });
  }
}

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

// Rows [0, decodes) have one token each.
inline void attend(const Step& s, int64_t decodes, bool amx, std::vector<bf16>& packed) {
  run_decodes(s, decodes);
  run_chunks(s, decodes, amx, packed);
}

}  // namespace splitserve
