// y = x W^T for bfloat16 on one core's caches, by AMX tiles where the CPU has them, else by AVX512_BF16.
//
// A weight [N, K] is laid out once, in panels of 32 columns: [N/32][K/32][2][16 pairs of k][16 columns][2], so that a step
// with few rows reads it as one stream, at the speed of memory; the next lines are asked for ahead, as the hardware does not
// keep enough of them in flight. Activations are laid out in tiles of 16 rows and 32 k, [rows/16][K/32][16][32], by those who
// make them: a tile is then a kilobyte in a row, whatever K.
#pragma once

#include <ATen/Parallel.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace splitserve {

constexpr int64_t kTile = 16 * 32;        // elements of a tile
constexpr int64_t kPanel = 32;            // columns of a panel
// Bytes of a weight that are asked for ahead, into L2. On a CPU with AMX the hardware sees to what is farther (measured: 18.5
// GB/s, 15 without); on AMD's EPYC it does not (one core, eight rows: 6 to 8 GB/s without, 8 to 9 at 1 KiB, 15 from 8 KiB on,
// 24 in huge pages). One or two rows, which wait for memory only, want it nearer (a step of two: 12 ms at 4 KiB, 13.4 at 16).
constexpr int64_t kTilesAhead = 1024, kLanesAhead = 16384, kFewAhead = 4096;
constexpr int64_t kRowsAtOnce = 32;       // of a block of C

// At least `elements` at a multiple of 64 bytes, in memory that is kept from call to call: fresh memory costs a page fault
// every 4 KiB.
inline bf16* aligned(std::vector<bf16>& buffer, int64_t elements) {
  if (static_cast<int64_t>(buffer.size()) < elements + 32) buffer.resize(elements + 32);
  return reinterpret_cast<bf16*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

// Activations in tiles. Sixteen elements from column c on (a multiple of 16) are adjacent.
struct Tiles {
  bf16* data;
  int64_t width;  // K
  bf16* at(int64_t row, int64_t column) const {
    return data + (row / 16 * (width / 32) + column / 32) * kTile + row % 16 * 32 + column % 32;
  }
  static int64_t elements(int64_t rows, int64_t width) { return (rows + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce * width; }
};

struct Weight {
  const bf16* data;
  int64_t columns, width;  // N, K: multiples of 32
  const bf16* panel(int64_t index) const { return data + index * kPanel * width; }
};

inline void pack(const bf16* from, int64_t columns, int64_t width, bf16* to) {
  at::parallel_for(0, columns / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kPanel; n < end * kPanel; n++)
      for (int64_t k = 0; k < width; k += 2) {
        bf16* pair = to + n / kPanel * kPanel * width + (k / 32 * 2 + n % kPanel / 16) * kTile + k % 32 / 2 * 32 + n % 16 * 2;
        std::memcpy(pair, from + n * width + k, 2 * sizeof(bf16));
      }
  });
}

// Linux gives AMX to a process that asks for it (arch/x86 "xstate" documentation); asked once, false where it is refused.
inline bool amx_allowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// C of up to 32 rows and one panel: [32][32] float32.
using Block = float[kRowsAtOnce * kPanel];

#define SPLITSERVE_AMX __attribute__((target("amx-tile,amx-bf16")))

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

SPLITSERVE_AMX inline void amx_begin() {
  static constexpr TileConfig config;  // static: gcc 12 sees only its first 8 bytes used, and would leave the rest out
  _tile_loadconfig(&config);
}

SPLITSERVE_AMX inline void amx_end() { _tile_release(); }

// `a`: the first tile of 16 rows, those of the next 16 are `a_next` elements on. `ahead`: B comes from memory.
template <bool kTwo>
SPLITSERVE_AMX inline void amx_block(const bf16* a, int64_t a_next, const bf16* b, int64_t steps, bool ahead, float* c) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; step++, a += kTile, b += 2 * kTile) {
    if (ahead)
      for (int64_t line = 0; line < 4 * kTile; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(b) + kTilesAhead + line, _MM_HINT_T1);
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, a + a_next, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, kPanel * sizeof(float));
  _tile_stored(1, c + 16, kPanel * sizeof(float));
  if constexpr (kTwo) {
    _tile_stored(2, c + 16 * kPanel, kPanel * sizeof(float));
    _tile_stored(3, c + 16 * kPanel + 16, kPanel * sizeof(float));
  }
}

inline __m512bh lanes_at(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// The pair of elements at p in all lanes.
inline __m512bh pair_at(const bf16* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof(x));
  return (__m512bh)_mm512_set1_epi32(x);
}

template <int64_t kBytes>
inline void ask_ahead(const bf16* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kBytes, _MM_HINT_T1);
}

// R rows (of one tile) by dot products of pairs. Both halves of the panel go together, so that a pair of a row is spread over
// the lanes once; where there are too few rows to hide it, B is rather read as it lies: asking for every second line then
// keeps the hardware asking for the others (measured with one row: 22 GB/s, 16 with both halves). A row's sums are added up in
// the same order either way: an answer does not depend on the rows beside it.
template <int R>
inline void lanes_block(const bf16* a, const bf16* b, int64_t steps, bool ahead, float* c) {
  __m512 sums[2][R];
  unrolled<R>([&](auto r) { sums[0][r] = sums[1][r] = _mm512_setzero_ps(); });
  for (int64_t step = 0; step < steps; step++, a += kTile, b += 2 * kTile)
    if constexpr (R <= 2) {
      unrolled<2>([&](auto half) {
        for (int64_t pair = 0; pair < 16; pair++) {
          const bf16* at = b + half * kTile + pair * 32;
          if (ahead && pair % 2 == 0) ask_ahead<kFewAhead>(at);
          const __m512bh lanes = lanes_at(at);
          unrolled<R>([&](auto r) { sums[half][r] = _mm512_dpbf16_ps(sums[half][r], pair_at(a + r * 32 + pair * 2), lanes); });
        }
      });
    } else {
      for (int64_t pair = 0; pair < 16; pair++) {
        const bf16* at = b + pair * 32;
        if (ahead) {
          ask_ahead<kLanesAhead>(at);
          ask_ahead<kLanesAhead>(at + kTile);
        }
        const __m512bh low = lanes_at(at), high = lanes_at(at + kTile);
        unrolled<R>([&](auto r) {
          const __m512bh both = pair_at(a + r * 32 + pair * 2);
          sums[0][r] = _mm512_dpbf16_ps(sums[0][r], both, low);
          sums[1][r] = _mm512_dpbf16_ps(sums[1][r], both, high);
        });
      }
    }
  unrolled<R>([&](auto r) {
    _mm512_storeu_ps(c + r * kPanel, sums[0][r]);
    _mm512_storeu_ps(c + r * kPanel + 16, sums[1][r]);
  });
}

// A stream from memory is read for six rows where there are three to five, for eight where there are seven, and what the others
// hold is nobody's: fewer use lines sooner than they come, and wait for longer (one core, a step of four rows: 11.2 ms as six, 12.3
// as eight, 16.8 as four when eight took 13.8).
inline void lanes_rows(const Tiles& x, int64_t row, int64_t rows, const bf16* b, bool ahead, float* c) {
  const int64_t steps = x.width / 32;
  for (int64_t r = 0; r < rows;) {
    const int64_t n = std::min<int64_t>({rows - r, 16 - (row + r) % 16, 8});  // 16 accumulators
    const bf16* a = x.at(row + r, 0);
    float* to = c + r * kPanel;
    switch (!ahead || n < 3 ? n : n > 6 ? 8 : 6) {
      case 8: lanes_block<8>(a, b, steps, ahead, to); break;
      case 7: lanes_block<7>(a, b, steps, ahead, to); break;
      case 6: lanes_block<6>(a, b, steps, ahead, to); break;
      case 5: lanes_block<5>(a, b, steps, ahead, to); break;
      case 4: lanes_block<4>(a, b, steps, ahead, to); break;
      case 3: lanes_block<3>(a, b, steps, ahead, to); break;
      case 2: lanes_block<2>(a, b, steps, ahead, to); break;
      default: lanes_block<1>(a, b, steps, ahead, to); break;
    }
    r += n;
    ahead = false;
  }
}

// Rows [row, row + rows) of x, at most 32, times one panel.
inline void multiply(const Tiles& x, int64_t row, int64_t rows, const bf16* panel, bool ahead, bool amx, float* c) {
  if (!amx)
    lanes_rows(x, row, rows, panel, ahead, c);
  else if (rows > 16)
    amx_block<true>(x.at(row, 0), x.width * 16, panel, x.width / 32, ahead, c);
  else
    amx_block<false>(x.at(row, 0), 0, panel, x.width / 32, ahead, c);
}

// Calls done(panel, first row, rows, C) for every block of x W^T; `together` panels of a block come with one call, C of the
// second behind that of the first.
template <int64_t kTogether, typename Done>
void gemm(const Tiles& x, int64_t rows, const Weight& w, bool amx, const Done& done) {
  at::parallel_for(0, w.columns / (kPanel * kTogether), 1, [&](int64_t begin, int64_t end) {
    if (amx) amx_begin();
    alignas(64) float c[kTogether * kRowsAtOnce * kPanel];
    for (int64_t group = begin; group < end; group++)
      for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, rows - row);
        for (int64_t i = 0; i < kTogether; i++)
          multiply(x, row, count, w.panel(group * kTogether + i), row == 0, amx, c + i * kRowsAtOnce * kPanel);
        done(group, row, count, c);
      }
    if (amx) amx_end();
  });
}

}  // namespace splitserve
