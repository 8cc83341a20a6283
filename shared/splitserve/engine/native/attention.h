// Attention over paged KV in bfloat16, for x86 with AVX512_BF16 (and AMX where oneDNN finds it).
//
// Blocks hold a head's run as [token][dim], 16 tokens or a multiple of it. Rows of one query token go by `decode.h`. Here are
// chunks, many query tokens a row: keys and values are laid out in pairs once a step (what oneDNN's block kernel reads), then
// tiles of query rows pass over tiles of keys with an online softmax (FlashAttention, arXiv:2205.14135). Scores and sums are
// float32; weights are rounded to bfloat16 before they meet V, as torch's SDPA does.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "decode.h"
#include "gemm.h"
#include "lanes.h"
#include "packing.h"
#include "paged.h"

namespace splitserve {

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

// The highest score of row r among the first `keys` that it sees, kHidden where it sees none.
inline float highest(const Scratch& t, int64_t r, int64_t keys, const Seen& seen) {
  __m512 top = _mm512_set1_ps(kHidden);
  for (int64_t i = 0; i < keys / kLanes; i++) {
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

// Weights of row r from its first `keys` scores, added to its sums.
inline void soften(Scratch& t, int64_t r, int64_t keys, const Seen& seen, float scale) {
  const Tiles weights{t.weights, keys};
  const __m512 factor = _mm512_set1_ps(scale), minus = _mm512_set1_ps(t.best[r] == kHidden ? 0.0f : t.best[r] * scale);
  __m512 total = _mm512_mul_ps(_mm512_load_ps(t.sum[r]), _mm512_set1_ps(t.shrink[r]));
  for (int64_t i = 0; i < keys / kLanes; i++) {
    const __m512 score = _mm512_load_ps(t.scores[i / 2] + r * kPanel + i % 2 * kLanes);
    __m512 w = exp2_lanes(_mm512_fmsub_ps(score, factor, minus));
    if (!seen.all) w = _mm512_maskz_mov_ps(seen.lanes[i], w);
    total = _mm512_add_ps(total, w);
    narrow(weights.at(r, i * kLanes), w);
  }
  _mm512_store_ps(t.sum[r], total);
}

// Query rows [r0, r1) of a chunk and KV head, whose keys and values are packed at `packed`; row r is token r / group, head
// r % group of its group.
inline void chunk_tile(const Step& s, const Chunk& c, int64_t head, int64_t packed, int64_t r0, int64_t r1, bool amx,
                       Coming& coming, Scratch& t) {
  const int64_t used = r1 - r0, token0 = s.query_start[c.row], dk = s.k.dim, dv = s.v.dim;
  const Tiles query{t.query, dk};
  const float scale = s.scale * kLog2E;
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
    const int64_t key0 = c.begin + tile * kKeys, keys = std::min(kKeys, (newest - key0) / kPanel * kPanel + kPanel);
    const Tiles weights{t.weights, keys};
    const bf16 *k = c.keys(s, packed, tile), *v = c.values(s, packed, tile);
    for (int64_t panel = 0; panel < keys / kPanel; panel++) {
      coming.ask();
      multiply(query, 0, used, k + panel * kPanel * dk, false, amx, t.scores[panel]);
    }
    const auto seen = [&](int64_t r) {
      const int64_t position = c.start + (r0 + r) / s.group;
      return Seen(s.first_seen(position) - key0, position + 1 - key0);
    };
    for (int64_t r = 0; r < used; r++) t.best[r] = std::max(t.top[r], highest(t, r, keys, seen(r)));
    shrink_all(t, scale);
    for (int64_t r = 0; r < used; r++) soften(t, r, keys, seen(r), scale);
    for (int64_t panel = 0; panel < dv / kPanel; panel++) {
      coming.ask();
      multiply(weights, 0, used, v + panel * kPanel * kKeys, false, amx, t.part);
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

// `together` KV heads of a chunk from `head` on.
inline void run_heads(const Step& s, const Chunk& c, int64_t head, int64_t together, bool amx) {
  at::parallel_for(0, together * c.tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      pack_keys(s, c, head + i / c.tiles, i % c.tiles, c.keys(s, i / c.tiles, i % c.tiles));
      pack_values(s, c, head + i / c.tiles, i % c.tiles, c.values(s, i / c.tiles, i % c.tiles));
    }
  });
  const int64_t rows = (c.stop - c.start) * s.group, tiles = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  at::parallel_for(0, together * tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    Coming coming(s, c, head + together, (end - begin) * c.tiles * (kKeys + s.v.dim) / kPanel);
    if (amx) amx_begin();
    for (int64_t i = begin; i < end; i++) {
      const int64_t r0 = i % tiles * kRowsAtOnce;
      chunk_tile(s, c, head + i / tiles, i / tiles, r0, std::min(rows, r0 + kRowsAtOnce), amx, coming, scratch);
    }
    if (amx) amx_end();
  });
}

inline void run_chunks(const Step& s, int64_t decodes, bool amx, std::vector<bf16>& packed) {
  // One thread packs a head when it comes to it: what it packed is still near. More share all heads' tiles.
  const int64_t together = at::get_num_threads() == 1 ? 1 : s.kv_heads;
  for (int64_t row = decodes; row < s.rows; row++) {
    const int64_t count = s.query_start[row + 1] - s.query_start[row];
    if (!count) continue;
    Chunk c{row, s.kv_len[row] - count, s.kv_len[row], 0, 0, nullptr, nullptr};
    c.begin = s.first_seen(c.start) / kLanes * kLanes;
    c.tiles = (c.stop - c.begin + kKeys - 1) / kKeys;
    c.k = aligned(packed, together * c.tiles * kKeys * (s.k.dim + s.v.dim));
    c.v = c.k + together * c.tiles * kKeys * s.k.dim;
    for (int64_t head = 0; head < s.kv_heads; head += together) run_heads(s, c, head, together, amx);
  }
}

// Rows [0, decodes) have one token each.
inline void attend(const Step& s, int64_t decodes, bool amx, std::vector<bf16>& packed) {
  run_decodes(s, decodes);
  run_chunks(s, decodes, amx, packed);
}

}  // namespace splitserve
