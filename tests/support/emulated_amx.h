// AMX tiles in plain C++, included before the kernels' library, so that its AMX path runs where the CPU has none.
//
// After the instructions' pseudo code in Intel's manual (volume 2): eight tiles of 16 rows of 64 bytes, and TDPBF16PS, which
// adds products of pairs in float32. A tile that is used without a configuration ends the process.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

struct State {
  bool configured = false;
  uint8_t tiles[8][16][64];
};

inline State& state() {
  static thread_local State own;
  return own;
}

inline uint8_t (&tile(int index))[16][64] {
  if (!state().configured) {
    std::fprintf(stderr, "tile %d is used without a configuration\n", index);
    std::abort();
  }
  return state().tiles[index];
}

inline void configure(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 8; i++) {
    uint16_t wide;
    std::memcpy(&wide, bytes + 16 + 2 * i, sizeof(wide));
    if (bytes[0] != 1 || wide != 64 || bytes[48 + i] != 16) {
      std::fprintf(stderr, "tile %d is configured as %d rows of %d bytes\n", i, bytes[48 + i], wide);
      std::abort();
    }
  }
  state().configured = true;
}

inline void release() { state().configured = false; }

inline void zero(int to) { std::memset(tile(to), 0, sizeof(tile(to))); }

inline void load(int to, const void* from, int64_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(tile(to)[row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int from, void* to, int64_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(static_cast<char*>(to) + row * stride, tile(from)[row], 64);
}

inline float widened(const uint8_t* bf16) {
  const uint8_t bytes[4] = {0, 0, bf16[0], bf16[1]};
  float value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

inline void multiply(int to, int left, int right) {
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float sum;
      std::memcpy(&sum, tile(to)[m] + 4 * n, sizeof(sum));
      for (int k = 0; k < 16; k++)
        for (int half = 0; half < 2; half++)
          sum += widened(tile(left)[m] + 4 * k + 2 * half) * widened(tile(right)[k] + 4 * n + 2 * half);
      std::memcpy(tile(to)[m] + 4 * n, &sum, sizeof(sum));
    }
}

}  // namespace emulated_amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::configure
#define _tile_release emulated_amx::release
#define _tile_zero emulated_amx::zero
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbf16ps emulated_amx::multiply
#define syscall(...) 0L  // the system gives tiles to whoever asks
