// Attention over paged KV in bfloat16, for x86 with AVX512_BF16 (and AMX where oneDNN finds it).
//
// Blocks hold a head's run as [token][dim], 16 tokens or a multiple of it. Two shapes of work:
//   decode   one query token a row: scores of 16 keys at a time by dot products along the head dimension, summed by a tree
//            of shuffles; the query heads that share a KV head go together, so that K and V are read once for all of them.
//   chunk    many query tokens a row: keys and values are laid out in pairs once a step (what oneDNN's block kernel reads),
//            then tiles of query rows pass over tiles of keys with an online softmax (FlashAttention, arXiv:2205.14135).
// Scores and sums are float32; weights are rounded to bfloat16 before they meet V in a chunk, as torch's SDPA does.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using bf16 = at::BFloat16;
constexpr int64_t kKeys = 128;      // keys of a tile
constexpr int64_t kRows = 64;       // query rows of a tile
constexpr int64_t kLanes = 16;      // float32 in a register, and tokens scored at once
constexpr float kHidden = -std::numeric_limits<float>::infinity();

inline __m512 widen(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

inline void narrow(bf16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

// exp(x) for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2]; relative error under 2e-7, and 0 below -87.
inline __m512 exp_lanes(__m512 x) {
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 120));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 24));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 6));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  return _mm512_mask_mov_ps(_mm512_scalef_ps(y, n), tiny, _mm512_setzero_ps());
}

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
  const bf16* data;
  int64_t block_stride, head_stride, dim;
  const bf16* run(int64_t block, int64_t head) const { return data + block * block_stride + head * head_stride; }
};

struct Step {
  const int64_t *query_start, *kv_len, *table;  // [S + 1], [S], [S, M]
  int64_t rows, table_width, block_tokens;
  int64_t heads, kv_heads, group;
  float scale;
  int64_t window;  // 0: all
  const bf16* query;
  int64_t query_token, query_head;  // strides
  bf16* out;                        // [T, Hq, Dv]
  Pool k, v;

  int64_t first_seen(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
  const int64_t* blocks(int64_t row) const { return table + row * table_width; }
};

// Weights of G query heads over `count` V rows into G x 64 (or 32) sums of `out`, stride `ld`.
template <int G, int V>
void weigh(const Step& s, const int64_t* blocks, int64_t head, int64_t first, int64_t last, const float* weights,
           int64_t weight_stride, int64_t dim0, float* out, int64_t ld) {
  __m512 sum[G][V];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < V; i++) sum[g][i] = _mm512_setzero_ps();
  for (int64_t t = first; t < last;) {
    const int64_t offset = t % s.block_tokens, stop = std::min(last, t - offset + s.block_tokens);
    const bf16* row = s.v.run(blocks[t / s.block_tokens], head) + offset * s.v.dim + dim0;
    for (; t < stop; t++, row += s.v.dim) {
      __m512 x[V];
      for (int i = 0; i < V; i++) x[i] = widen(row + i * kLanes);
      for (int g = 0; g < G; g++) {
        const __m512 w = _mm512_set1_ps(weights[g * weight_stride + t - first]);
        for (int i = 0; i < V; i++) sum[g][i] = _mm512_fmadd_ps(w, x[i], sum[g][i]);
      }
    }
  }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < V; i++) _mm512_storeu_ps(out + g * ld + dim0 + i * kLanes, sum[g][i]);
}

template <int G>
void decode_heads(const Step& s, int64_t row, int64_t head, int64_t g0, std::vector<float>& scores) {
  const int64_t token = s.query_start[row], position = s.kv_len[row] - 1;
  const int64_t seen = s.first_seen(position), first = seen / kLanes * kLanes;  // keys before `seen` get no weight
  const int64_t length = position + 1 - first, padded = (length + kLanes - 1) / kLanes * kLanes;
  const int64_t* blocks = s.blocks(row);
  scores.resize(G * padded);
  const bf16* query = s.query + token * s.query_token + (head * s.group + g0) * s.query_head;
  for (int64_t t = 0; t < padded; t += kLanes) {
    const int64_t at = first + t;
    const bf16* k = s.k.run(blocks[at / s.block_tokens], head) + at % s.block_tokens * s.k.dim;
    for (int g = 0; g < G; g++) {
      __m512 sum[kLanes];
      for (auto& x : sum) x = _mm512_setzero_ps();
      for (int64_t d = 0; d < s.k.dim; d += 2 * kLanes) {
        const __m512bh q = (__m512bh)_mm512_loadu_si512(query + g * s.query_head + d);
        for (int64_t i = 0; i < kLanes; i++)
          sum[i] = _mm512_dpbf16_ps(sum[i], q, (__m512bh)_mm512_loadu_si512(k + i * s.k.dim + d));
      }
      _mm512_storeu_ps(scores.data() + g * padded + t, _mm512_mul_ps(sums_of_16(sum), _mm512_set1_ps(s.scale)));
    }
  }
  alignas(64) float out[G * 256];
  float total[G];
  for (int g = 0; g < G; g++) {
    float* line = scores.data() + g * padded;
    std::fill(line, line + (seen - first), kHidden);
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
  for (; d + 64 <= s.v.dim; d += 64)
    weigh<G, 4>(s, blocks, head, first, position + 1, scores.data(), padded, d, out, s.v.dim);
  for (; d < s.v.dim; d += 32)
    weigh<G, 2>(s, blocks, head, first, position + 1, scores.data(), padded, d, out, s.v.dim);
  for (int g = 0; g < G; g++) {
    bf16* to = s.out + (token * s.heads + head * s.group + g0 + g) * s.v.dim;
    const __m512 inverse = _mm512_set1_ps(1.0f / total[g]);
    for (int64_t i = 0; i < s.v.dim; i += kLanes)
      narrow(to + i, _mm512_mul_ps(_mm512_loadu_ps(out + g * s.v.dim + i), inverse));
  }
}

void decode(const Step& s, int64_t row, int64_t head, std::vector<float>& scores) {
  int64_t g = 0;
  for (; g + 4 <= s.group; g += 4) decode_heads<4>(s, row, head, g, scores);
  switch (s.group - g) {
    case 3: decode_heads<3>(s, row, head, g, scores); break;
    case 2: decode_heads<2>(s, row, head, g, scores); break;
    case 1: decode_heads<1>(s, row, head, g, scores); break;
  }
}

// A chunk's keys from `begin` (a multiple of 16) on, in tiles of kKeys: K as [dim/2][key][2], V as [key/2][dim][2].
struct Chunk {
  int64_t row, start, stop;  // positions of its queries
  int64_t begin, tiles;      // keys
  bf16 *k, *v;               // [kv_heads][tiles][kKeys * dim]
};

void pack_keys(const Step& s, const Chunk& c, int64_t head, int64_t tile) {
  bf16* to = c.k + (head * c.tiles + tile) * kKeys * s.k.dim;
  const int64_t from = c.begin + tile * kKeys;
  for (int64_t t = 0; t < kKeys; t += kLanes) {
    const int64_t at = from + t;
    if (at >= c.stop) {
      for (int64_t d = 0; d < s.k.dim; d += 2) std::memset(to + d * kKeys + t * 2, 0, kLanes * 2 * sizeof(bf16));
      continue;
    }
    const bf16* k = s.k.run(s.blocks(c.row)[at / s.block_tokens], head) + at % s.block_tokens * s.k.dim;
    const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(static_cast<int>(s.k.dim / 2)));
    for (int64_t d = 0; d < s.k.dim; d += 2) {
      __m512i pairs = _mm512_i32gather_epi32(lanes, reinterpret_cast<const int*>(k + d), 4);
      const __mmask16 known = c.stop - at >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (c.stop - at)) - 1);
      _mm512_storeu_si512(to + d * kKeys + t * 2, _mm512_maskz_mov_epi32(known, pairs));
    }
  }
}

void pack_values(const Step& s, const Chunk& c, int64_t head, int64_t tile) {
  bf16* to = c.v + (head * c.tiles + tile) * kKeys * s.v.dim;
  const int64_t from = c.begin + tile * kKeys;
  for (int64_t t = 0; t < kKeys; t += 2, to += 2 * s.v.dim) {
    const int64_t at = from + t;
    if (at >= c.stop) {
      std::memset(to, 0, 2 * s.v.dim * sizeof(bf16));
      continue;
    }
    const bf16* v = s.v.run(s.blocks(c.row)[at / s.block_tokens], head) + at % s.block_tokens * s.v.dim;
    const bool second = at + 1 < c.stop;  // block_tokens is even, so it is in the same run
    for (int64_t d = 0; d < s.v.dim; d += kLanes) {
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + d)));
      __m512i odd = _mm512_setzero_si512();
      if (second)
        odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + s.v.dim + d)));
      _mm512_storeu_si512(to + 2 * d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

struct Scratch {
  std::vector<bf16> query, weights;
  std::vector<float> scores, out;
};

// Softmax of one row of a tile: weights of keys [lo, hi), the rest 0. Gives the new maximum and sum, and rescales `out`.
void soften(const float* scores, bf16* weights, int64_t lo, int64_t hi, float scale, float& top, float& sum, float* out,
            int64_t dim) {
  const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 line[kKeys / kLanes], highest = _mm512_set1_ps(kHidden);
  for (int64_t i = 0; i < kKeys / kLanes; i++) {
    const __m512i at = _mm512_add_epi32(index, _mm512_set1_epi32(static_cast<int>(i * kLanes)));
    const __mmask16 seen = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(static_cast<int>(lo))) &
                           _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32(static_cast<int>(hi)));
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + i * kLanes), _mm512_set1_ps(scale));
    line[i] = _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), seen, scaled);
    highest = _mm512_max_ps(highest, line[i]);
  }
  const float best = std::max(top, _mm512_reduce_max_ps(highest));
  const __m512 minus = _mm512_set1_ps(best);
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < kKeys / kLanes; i++) {
    const __m512 w = exp_lanes(_mm512_sub_ps(line[i], minus));
    total = _mm512_add_ps(total, w);
    narrow(weights + i * kLanes, w);
  }
  const float shrink = top == kHidden ? 0.0f : std::exp(top - best);
  sum = sum * shrink + _mm512_reduce_add_ps(total);
  top = best;
  if (shrink != 1.0f)
    for (int64_t d = 0; d < dim; d += kLanes)
      _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(out + d), _mm512_set1_ps(shrink)));
}

// Query rows [r0, r1) of a chunk and KV head; row r is token r / group, head r % group of its group.
void chunk_tile(const Step& s, const Chunk& c, int64_t head, int64_t r0, int64_t r1, Scratch& scratch) {
  const int64_t used = r1 - r0, m = used <= 16 ? 16 : used <= 32 ? 32 : kRows;  // few shapes: each is compiled once
  const int64_t token0 = s.query_start[c.row], dk = s.k.dim, dv = s.v.dim;
  scratch.query.resize(kRows * dk);
  scratch.weights.resize(kRows * kKeys);
  scratch.scores.resize(kRows * kKeys);
  scratch.out.assign(kRows * dv, 0.0f);
  for (int64_t r = 0; r < m; r++) {
    bf16* to = scratch.query.data() + r * dk;
    if (r >= used) {
      std::memset(to, 0, dk * sizeof(bf16));
      continue;
    }
    const int64_t token = token0 + (r0 + r) / s.group, h = head * s.group + (r0 + r) % s.group;
    std::memcpy(to, s.query + token * s.query_token + h * s.query_head, dk * sizeof(bf16));
  }
  float top[kRows], sum[kRows];
  std::fill(top, top + kRows, kHidden);
  std::fill(sum, sum + kRows, 0.0f);
  const int64_t newest = c.start + (r1 - 1) / s.group, oldest = s.first_seen(c.start + r0 / s.group);
  for (int64_t tile = (oldest - c.begin) / kKeys; c.begin + tile * kKeys <= newest; tile++) {
    const int64_t key0 = c.begin + tile * kKeys;
    at::native::cpublas::brgemm(m, kKeys, dk, dk, kKeys, kKeys, false, scratch.query.data(),
                                c.k + (head * c.tiles + tile) * kKeys * dk, scratch.scores.data());
    for (int64_t r = 0; r < m; r++) {
      bf16* weights = scratch.weights.data() + r * kKeys;
      const int64_t position = c.start + (r0 + r) / s.group;
      const int64_t lo = std::max<int64_t>(0, s.first_seen(position) - key0);
      const int64_t hi = std::min(kKeys, position + 1 - key0);
      if (r >= used || hi <= lo)
        std::memset(weights, 0, kKeys * sizeof(bf16));
      else
        soften(scratch.scores.data() + r * kKeys, weights, lo, hi, s.scale, top[r], sum[r],
               scratch.out.data() + r * dv, dv);
    }
    at::native::cpublas::brgemm(m, dv, kKeys, kKeys, dv, dv, true, scratch.weights.data(),
                                c.v + (head * c.tiles + tile) * kKeys * dv, scratch.out.data());
  }
  for (int64_t r = 0; r < used; r++) {
    const int64_t token = token0 + (r0 + r) / s.group, h = head * s.group + (r0 + r) % s.group;
    bf16* to = s.out + (token * s.heads + h) * dv;
    const __m512 inverse = _mm512_set1_ps(1.0f / sum[r]);
    for (int64_t d = 0; d < dv; d += kLanes)
      narrow(to + d, _mm512_mul_ps(_mm512_loadu_ps(scratch.out.data() + r * dv + d), inverse));
  }
}

void run_decodes(const Step& s, int64_t decodes) {
  at::parallel_for(0, decodes * s.kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t i = begin; i < end; i++) decode(s, i / s.kv_heads, i % s.kv_heads, scores);
  });
}

void run_chunks(const Step& s, int64_t decodes) {
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
  const at::Tensor packed = at::empty({keys * s.kv_heads * (s.k.dim + s.v.dim)}, at::kBFloat16);
  bf16* next = packed.data_ptr<bf16>();
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
    const int64_t rows = (c.stop - c.start) * s.group, tiles = (rows + kRows - 1) / kRows;
    at::parallel_for(0, s.kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t i = begin; i < end; i++) {
        const int64_t r0 = i % tiles * kRows;
        chunk_tile(s, c, i / tiles, r0, std::min(rows, r0 + kRows), scratch);
      }
      at::native::cpublas::brgemm_release();
    });
  }
}

// Copies [T, H, D] into the slots of a pool [blocks, H, B, D].
void write(const at::Tensor& from, const at::Tensor& pool, const int64_t* slots, int64_t block_tokens) {
  const int64_t dim = from.size(2);
  bf16* data = pool.data_ptr<bf16>();
  const bf16* source = from.data_ptr<bf16>();
  for (int64_t t = 0; t < from.size(0); t++) {
    bf16* block = data + slots[t] / block_tokens * pool.stride(0) + slots[t] % block_tokens * dim;
    for (int64_t h = 0; h < from.size(1); h++)
      std::memcpy(block + h * pool.stride(1), source + t * from.stride(0) + h * from.stride(1), dim * sizeof(bf16));
  }
}

void check(const at::Tensor& x, int64_t dims, const char* name) {
  TORCH_CHECK(x.dim() == dims && x.scalar_type() == at::kBFloat16 && x.stride(-1) == 1, name,
              ": wants bfloat16 of ", dims, " dims with adjacent elements");
}

// query [T, Hq, Dk], key [T, H, Dk], value [T, H, Dv], k_pool [N, H, B, Dk], v_pool [N, H, B, Dv], query_start [S + 1],
// kv_len [S], table [S, M], slots [T] -> [T, Hq, Dv]. Rows [0, decodes) have one token each. window 0: all.
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const at::Tensor& k_pool, const at::Tensor& v_pool, const at::Tensor& query_start,
                           const at::Tensor& kv_len, const at::Tensor& table, const at::Tensor& slots, int64_t decodes,
                           double scale, int64_t window, bool writes) {
  check(query, 3, "query");
  check(key, 3, "key");
  check(value, 3, "value");
  check(k_pool, 4, "k_pool");
  check(v_pool, 4, "v_pool");
  const int64_t block_tokens = k_pool.size(2), dk = k_pool.size(3), dv = v_pool.size(3);
  TORCH_CHECK(block_tokens % kLanes == 0 && dk % 32 == 0 && dv % 32 == 0 && dv <= 256, "shapes this kernel has not: ",
              block_tokens, " tokens, ", dk, " and ", dv, " dims");
  if (writes) {
    write(key, k_pool, slots.data_ptr<int64_t>(), block_tokens);
    write(value, v_pool, slots.data_ptr<int64_t>(), block_tokens);
  }
  at::Tensor out = at::empty({query.size(0), query.size(1), dv}, query.options());
  Step s;
  s.query_start = query_start.data_ptr<int64_t>();
  s.kv_len = kv_len.data_ptr<int64_t>();
  s.table = table.data_ptr<int64_t>();
  s.rows = kv_len.size(0);
  s.table_width = table.size(1);
  s.block_tokens = block_tokens;
  s.heads = query.size(1);
  s.kv_heads = k_pool.size(1);
  s.group = s.heads / s.kv_heads;
  s.scale = static_cast<float>(scale);
  s.window = window;
  s.query = query.data_ptr<bf16>();
  s.query_token = query.stride(0);
  s.query_head = query.stride(1);
  s.out = out.data_ptr<bf16>();
  s.k = Pool{k_pool.data_ptr<bf16>(), k_pool.stride(0), k_pool.stride(1), dk};
  s.v = Pool{v_pool.data_ptr<bf16>(), v_pool.stride(0), v_pool.stride(1), dv};
  run_decodes(s, decodes);
  run_chunks(s, decodes);
  return out;
}

}  // namespace

TORCH_LIBRARY(splitserve, library) {
  library.def(
      "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor query_start, "
      "Tensor kv_len, Tensor table, Tensor slots, int decodes, float scale, int window, bool writes) -> Tensor");
}

TORCH_LIBRARY_IMPL(splitserve, CPU, library) { library.impl("paged_attention", paged_attention); }
