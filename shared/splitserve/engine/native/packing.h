// A chunk's keys and values, laid out for products: in pairs, in tiles, from blocks of a pool.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "lanes.h"
#include "paged.h"

namespace splitserve {

constexpr int64_t kKeys = 128;  // keys of a tile

// A chunk's keys from `begin` (a multiple of 16) on, laid out as weights (gemm.h) in tiles of kKeys: K [keys, dim], V
// [dim, keys].
struct Chunk {
  int64_t row, start, stop;  // positions of its queries
  int64_t begin, tiles;      // keys
  bf16 *k, *v;               // [heads that are packed together][tiles][kKeys * dim]

  bf16* keys(const Step& s, int64_t head, int64_t tile) const { return k + (head * tiles + tile) * kKeys * s.k.dim; }
  bf16* values(const Step& s, int64_t head, int64_t tile) const { return v + (head * tiles + tile) * kKeys * s.v.dim; }
  int64_t runs() const { return (stop - begin + kLanes - 1) / kLanes; }  // sixteens of keys
};

// Sixteen keys or values of a head, one after another.
inline const bf16* run_at(const Step& s, const Chunk& c, const Pool& pool, int64_t head, int64_t at) {
  return pool.at(s.blocks(c.row)[at / s.block_tokens], head) + at % s.block_tokens * pool.dim;
}

// Asks for the keys and values of a chunk and KV head while another is worked on, an equal part at each of `calls`, which are no
// fewer than there will be (of a prompt's first chunk the rest was just written): the hardware finds no order in a block table
// (one core of an AMD EPYC, 32 tokens beside four decodes at a context of 512: a step takes 0.98).
class Coming {
 public:
  Coming(const Step& s, const Chunk& c, int64_t head, int64_t calls) : s_(s), c_(c), head_(head) {
    const int64_t lines = head < s.kv_heads ? c.runs() * (s.k.dim + s.v.dim) / 2 : 0;  // 64 bytes each
    part_ = (lines + calls - 1) / std::max<int64_t>(1, calls);
    if (lines) enter();
  }
  void ask() {
    for (int64_t left = part_; left > 0 && next_ < stop_;) {
      const int64_t some = std::min<int64_t>(left, (stop_ - next_) / 64);
      for (int64_t i = 0; i < some; i++, next_ += 64) _mm_prefetch(next_, _MM_HINT_T1);
      left -= some;
      if (next_ == stop_ && ++half_ < 2 * c_.runs()) enter();
    }
  }

 private:
  void enter() {
    const Pool& pool = half_ % 2 ? s_.v : s_.k;
    next_ = reinterpret_cast<const char*>(run_at(s_, c_, pool, head_, c_.begin + half_ / 2 * kLanes));
    stop_ = next_ + kLanes * pool.dim * sizeof(bf16);
  }
  const Step& s_;
  const Chunk& c_;
  const int64_t head_;
  int64_t part_;      // lines at a call
  int64_t half_ = 0;  // of the runs: even its keys, odd its values
  const char *next_ = nullptr, *stop_ = nullptr;
};

// Sixteen rows of sixteen dwords become their columns.
inline void transpose_16(__m512i x[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)  // b[i + j]: in quarter q, column 4 q + j of rows i to i + 3
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  for (int j = 0; j < 4; j++) {
    const __m512i even_top = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x88);
    const __m512i odd_top = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xdd);
    const __m512i even_low = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xdd);
    x[j] = _mm512_shuffle_i32x4(even_top, even_low, 0x88);
    x[j + 4] = _mm512_shuffle_i32x4(odd_top, odd_low, 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(even_top, even_low, 0xdd);
    x[j + 12] = _mm512_shuffle_i32x4(odd_top, odd_low, 0xdd);
  }
}

// Keys past the chunk's end are zeros: they get no weight, and what is left in a block may be anything.
inline void pack_keys(const Step& s, const Chunk& c, int64_t head, int64_t tile, bf16* to) {
  const int64_t dim = s.k.dim;
  for (int64_t t = 0; t < kKeys; t += kLanes) {
    const int64_t at = c.begin + tile * kKeys + t, known = std::clamp<int64_t>(c.stop - at, 0, kLanes);
    bf16* half = to + t / kPanel * kPanel * dim + t % kPanel / 16 * kTile;
    const bf16* k = known ? run_at(s, c, s.k, head, at) : nullptr;
    for (int64_t d = 0; d < dim; d += 32) {
      __m512i rows[kLanes];
      for (int64_t i = 0; i < kLanes; i++)
        rows[i] = i < known ? _mm512_loadu_si512(k + i * dim + d) : _mm512_setzero_si512();
      transpose_16(rows);
      for (int64_t pair = 0; pair < kLanes; pair++) _mm512_store_si512(half + d / 32 * 2 * kTile + pair * 32, rows[pair]);
    }
  }
}

inline void pack_values(const Step& s, const Chunk& c, int64_t head, int64_t tile, bf16* to) {
  const int64_t dim = s.v.dim;
  for (int64_t t = 0; t < kKeys; t += 2) {
    const int64_t at = c.begin + tile * kKeys + t;
    const bool first = at < c.stop, second = at + 1 < c.stop;  // block_tokens is even, so both are in the same run
    const bf16* v = first ? run_at(s, c, s.v, head, at) : nullptr;
    for (int64_t d = 0; d < dim; d += kLanes) {
      __m512i even = _mm512_setzero_si512(), odd = even;
      if (first) even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + d)));
      if (second) odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + dim + d)));
      bf16* pair = to + d / kPanel * kPanel * kKeys + (t / 32 * 2 + d % kPanel / 16) * kTile + t % 32 / 2 * 32;
      _mm512_store_si512(pair, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

}  // namespace splitserve
