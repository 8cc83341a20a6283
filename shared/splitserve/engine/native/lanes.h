// Sixteen float32 lanes over bfloat16 memory: what all kernels here are made of. Needs AVX512_BF16.
#pragma once

#include <c10/util/BFloat16.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace splitserve {

using bf16 = c10::BFloat16;
constexpr int64_t kLanes = 16;
constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

// run(0) to run(N - 1), written out, each number a constant: an array of registers that is indexed by the counter of a loop ends up
// in memory, or does not, as the compiler pleases (GCC 12: attention at half its speed after a change elsewhere).
template <int N, class Run>
__attribute__((always_inline)) inline void unrolled(const Run& run) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) { (run(std::integral_constant<int, i>()), ...); }
  (std::make_integer_sequence<int, N>());
}

inline __m512 widen(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

inline void narrow(bf16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

// 2^x for x <= 0, relative error under 9e-5: the result is rounded to bfloat16. 1 at 0 to the bit, 0 at -inf.
inline __m512 exp2_lanes(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  __m512 y = _mm512_set1_ps(0.0770670490f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.2276449836f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.6951167881f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, x);
}

// x * sigmoid(y), without overflow at either end; relative error under 2e-4, the result is rounded to bfloat16. A NaN stays one.
inline __m512 times_sigmoid(__m512 x, __m512 y) {
  const __m512 e = exp2_lanes(_mm512_mul_ps(_mm512_abs_ps(y), _mm512_set1_ps(-kLog2E)));
  const __mmask16 negative = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 numerator = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), negative, e);
  return _mm512_mul_ps(_mm512_mul_ps(x, numerator), _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), e)));
}

inline __m512 silu(__m512 x) { return times_sigmoid(x, x); }

// GELU by tanh: 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline __m512 gelu_tanh(__m512 x) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(0.044715f)));
  return times_sigmoid(x, _mm512_mul_ps(_mm512_add_ps(x, cube), _mm512_set1_ps(1.595769122f)));
}

}  // namespace splitserve
