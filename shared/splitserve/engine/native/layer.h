// One decoder layer of the Llama family in one call: norm, QKV, RoPE, paged attention, output, norm, gated MLP.
//
// What this saves over one torch operator at a time: weights are read at the speed of memory (gemm.h), activations stay in the
// tiles that the next product reads, sums stay in float32 from a product to what follows it, and thirty operators' dispatch
// becomes one. Rounded to bfloat16 where transformers rounds: the residual stream, q, k, v, attention and the MLP's middle.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "attention.h"
#include "gemm.h"

namespace splitserve {

// What a layer computes, beside its weights.
struct Shape {
  int64_t hidden, heads, kv_heads, dim, middle;
  int64_t window;    // 0: all
  bool gelu;         // else SiLU
  float scale, eps;
};

// Scratch memory of a thread, kept from step to step.
struct Workspace {
  std::vector<bf16> x, qkv, attended, middle, rows, packed, kept;
  std::vector<int64_t> places;
};

// Tokens of a step whose output is wanted, in order, each the last of its row: of a model's last layer the others need but K
// and V.
struct Kept {
  const int64_t* tokens;
  int64_t count;
};

// 1 / sqrt(mean(x^2) + eps) of a row.
inline float inverse_rms(const bf16* x, int64_t width, float eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += kLanes) {
    const __m512 v = widen(x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(width) + eps);
}

// Rows of [T, width] normalised into tiles.
inline void norm_to_tiles(const bf16* x, int64_t tokens, int64_t width, const float* weight, float eps, const Tiles& to) {
  at::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const bf16* row = x + t * width;
      const __m512 inverse = _mm512_set1_ps(inverse_rms(row, width, eps));
      for (int64_t i = 0; i < width; i += kLanes)
        narrow(to.at(t, i), _mm512_mul_ps(_mm512_mul_ps(widen(row + i), inverse), _mm512_loadu_ps(weight + i)));
    }
  });
}

// to = residual + norm(x), rows of [T, width].
inline void norm_and_add(const bf16* x, const bf16* residual, int64_t tokens, int64_t width, const float* weight, float eps,
                         bf16* to) {
  at::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const bf16* row = x + t * width;
      const __m512 inverse = _mm512_set1_ps(inverse_rms(row, width, eps));
      for (int64_t i = 0; i < width; i += kLanes) {
        const __m512 normed = _mm512_mul_ps(_mm512_mul_ps(widen(row + i), inverse), _mm512_loadu_ps(weight + i));
        narrow(to + t * width + i, _mm512_add_ps(widen(residual + t * width + i), normed));
      }
    }
  });
}

// A head in place: normalised if `weight` is there, then turned, halves against each other (transformers' rotate_half).
inline void turn(bf16* head, int64_t dim, const float* weight, float eps, const bf16* cos, const bf16* sin) {
  const __m512 inverse = _mm512_set1_ps(weight ? inverse_rms(head, dim, eps) : 1.0f);
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    __m512 low = widen(head + i), high = widen(head + half + i);
    if (weight) {
      low = _mm512_mul_ps(_mm512_mul_ps(low, inverse), _mm512_loadu_ps(weight + i));
      high = _mm512_mul_ps(_mm512_mul_ps(high, inverse), _mm512_loadu_ps(weight + half + i));
    }
    narrow(head + i, _mm512_fmsub_ps(low, widen(cos + i), _mm512_mul_ps(high, widen(sin + i))));
    narrow(head + half + i, _mm512_fmadd_ps(high, widen(cos + half + i), _mm512_mul_ps(low, widen(sin + half + i))));
  }
}

struct Layer {
  Shape shape;
  Weight qkv, out, gate_up, down;  // gate_up: a panel of gate, a panel of up, in turn
  const float *qkv_bias, *out_bias;                               // null: none
  const float *norm_in, *norm_middle;                             // before attention, before the MLP
  const float *norm_q, *norm_k, *norm_attended, *norm_mlp;        // null: none; the last two before the residual is added

  // hidden [T, hidden] -> to [T, hidden]; of the rows of `to` only those in `kept` are written, where that is not null.
  void run(const bf16* hidden, int64_t tokens, const bf16* cos, const bf16* sin, const Places& places, const Pool& k,
           const Pool& v, int64_t block_tokens, const Kept* kept, bool amx, Workspace& work, bf16* to) const {
    const Tiles x{aligned(work.x, Tiles::elements(tokens, shape.hidden)), shape.hidden};
    norm_to_tiles(hidden, tokens, shape.hidden, norm_in, shape.eps, x);
    bf16* projected = aligned(work.qkv, tokens * qkv.columns);
    gemm<1>(x, tokens, qkv, amx, [&](int64_t panel, int64_t row, int64_t rows, const float* c) {
      store(c, row, rows, panel, qkv_bias, nullptr, projected, qkv.columns);
    });
    turn_and_write(projected, tokens, cos, sin, places, k, v, block_tokens);
    if (!kept) return leave(hidden, projected, tokens, places, k, v, block_tokens, amx, work, to);
    bf16* rows = aligned(work.kept, kept->count * (qkv.columns + 2 * shape.hidden));
    bf16 *residual = rows + kept->count * qkv.columns, *left = residual + kept->count * shape.hidden;
    for (int64_t i = 0; i < kept->count; i++) {
      std::memcpy(rows + i * qkv.columns, projected + kept->tokens[i] * qkv.columns, qkv.columns * sizeof(bf16));
      std::memcpy(residual + i * shape.hidden, hidden + kept->tokens[i] * shape.hidden, shape.hidden * sizeof(bf16));
    }
    leave(residual, rows, kept->count, alone(places, *kept, work.places), k, v, block_tokens, amx, work, left);
    for (int64_t i = 0; i < kept->count; i++)
      std::memcpy(to + kept->tokens[i] * shape.hidden, left + i * shape.hidden, shape.hidden * sizeof(bf16));
  }

 private:
  // Where the kept tokens stand, each a row with one token.
  static Places alone(const Places& of, const Kept& kept, std::vector<int64_t>& memory) {
    const int64_t n = kept.count, width = of.table_width;
    memory.resize(n * (width + 2) + 1);
    int64_t *query_start = memory.data(), *kv_len = query_start + n + 1, *table = kv_len + n;
    for (int64_t i = 0, row = 0; i < n; i++) {
      while (of.query_start[row + 1] <= kept.tokens[i]) row++;
      query_start[i] = i;
      kv_len[i] = of.kv_len[row];
      std::copy_n(of.table + row * width, width, table + i * width);
    }
    query_start[n] = n;
    return Places{query_start, kv_len, table, nullptr, n, width, n};
  }

  // From a layer's queries, keys and values to its output.
  void leave(const bf16* hidden, const bf16* projected, int64_t tokens, const Places& places, const Pool& k, const Pool& v,
             int64_t block_tokens, bool amx, Workspace& work, bf16* to) const {
    const int64_t wide = shape.heads * shape.dim;
    const Tiles x{aligned(work.x, Tiles::elements(tokens, shape.hidden)), shape.hidden};
    const Tiles attended{aligned(work.attended, Tiles::elements(tokens, wide)), wide};
    attend(step(projected, places, k, v, block_tokens, attended), places.decodes, amx, work.packed);
    project(attended, tokens, out, out_bias, norm_attended, hidden, amx, work, to);
    norm_to_tiles(to, tokens, shape.hidden, norm_middle, shape.eps, x);
    const Tiles middle{aligned(work.middle, Tiles::elements(tokens, shape.middle)), shape.middle};
    gemm<2>(x, tokens, gate_up, amx, [&](int64_t pair, int64_t row, int64_t rows, const float* c) {
      gate(c, row, rows, pair, middle);
    });
    project(middle, tokens, down, nullptr, norm_mlp, to, amx, work, to);
  }

  // to = residual + [norm](x W^T). `residual` and `to` may be the same.
  void project(const Tiles& x, int64_t tokens, const Weight& w, const float* bias, const float* norm, const bf16* residual,
               bool amx, Workspace& work, bf16* to) const {
    bf16* rows_of = norm ? aligned(work.rows, tokens * w.columns) : to;
    gemm<1>(x, tokens, w, amx, [&](int64_t panel, int64_t row, int64_t rows, const float* c) {
      store(c, row, rows, panel, bias, norm ? nullptr : residual, rows_of, w.columns);
    });
    if (norm) norm_and_add(rows_of, residual, tokens, w.columns, norm, shape.eps, to);
  }

  static void store(const float* c, int64_t row, int64_t rows, int64_t panel, const float* bias, const bf16* residual,
                    bf16* to, int64_t width) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        const int64_t column = panel * kPanel + i, at = (row + r) * width + column;
        __m512 y = _mm512_load_ps(c + r * kPanel + i);
        if (bias) y = _mm512_add_ps(y, _mm512_loadu_ps(bias + column));
        if (residual) y = _mm512_add_ps(y, widen(residual + at));
        narrow(to + at, y);
      }
  }

  void gate(const float* c, int64_t row, int64_t rows, int64_t pair, const Tiles& to) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        const __m512 opened = _mm512_load_ps(c + r * kPanel + i);
        const __m512 value = _mm512_load_ps(c + kRowsAtOnce * kPanel + r * kPanel + i);
        narrow(to.at(row + r, pair * kPanel + i), _mm512_mul_ps(shape.gelu ? gelu_tanh(opened) : silu(opened), value));
      }
  }

  void turn_and_write(bf16* projected, int64_t tokens, const bf16* cos, const bf16* sin, const Places& places, const Pool& k,
                      const Pool& v, int64_t block_tokens) const {
    at::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        bf16* row = projected + t * qkv.columns;
        const bf16 *c = cos + t * shape.dim, *s = sin + t * shape.dim;
        for (int64_t h = 0; h < shape.heads; h++) turn(row + h * shape.dim, shape.dim, norm_q, shape.eps, c, s);
        bf16 *key = row + shape.heads * shape.dim, *value = key + shape.kv_heads * shape.dim;
        const int64_t block = places.slots[t] / block_tokens, offset = places.slots[t] % block_tokens * shape.dim;
        for (int64_t h = 0; h < shape.kv_heads; h++) {
          turn(key + h * shape.dim, shape.dim, norm_k, shape.eps, c, s);
          std::memcpy(k.at(block, h) + offset, key + h * shape.dim, shape.dim * sizeof(bf16));
          std::memcpy(v.at(block, h) + offset, value + h * shape.dim, shape.dim * sizeof(bf16));
        }
      }
    });
  }

  Step step(const bf16* projected, const Places& places, const Pool& k, const Pool& v, int64_t block_tokens,
            const Tiles& to) const {
    Step s = step_over(places, k, v, block_tokens, shape.heads, shape.kv_heads);
    s.scale = shape.scale;
    s.window = shape.window;
    s.query = projected;
    s.query_token = qkv.columns;
    s.query_head = shape.dim;
    s.out = Out{to.data, to.width, true};
    return s;
  }
};

}  // namespace splitserve
