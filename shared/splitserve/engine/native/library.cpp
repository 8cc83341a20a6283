// The kernels as torch operators: splitserve::paged_attention alone, and DecoderRun, whole layers. See the headers.
//
// Tensors of a step: query_start [S + 1], kv_len [S], table [S, M], slots [T], all int64; pools bfloat16 [N, H, B, D].

#include <torch/custom_class.h>
#include <torch/library.h>

#include <sys/mman.h>

#include "layer.h"

namespace splitserve {
namespace {

void check(const at::Tensor& x, int64_t dims, const char* name) {
  TORCH_CHECK(x.dim() == dims && x.scalar_type() == at::kBFloat16 && x.stride(-1) == 1, name,
              ": wants bfloat16 of ", dims, " dims with adjacent elements");
}

Places places_of(const at::Tensor& query_start, const at::Tensor& kv_len, const at::Tensor& table, const at::Tensor& slots,
                 int64_t decodes) {
  return Places{query_start.data_ptr<int64_t>(), kv_len.data_ptr<int64_t>(), table.data_ptr<int64_t>(),
                slots.data_ptr<int64_t>(),       kv_len.size(0),            table.size(1),
                decodes};
}

Workspace& workspace() {
  thread_local Workspace work;
  return work;
}

// Copies [T, H, D] into the slots of a pool.
void write(const at::Tensor& from, const Pool& pool, const int64_t* slots, int64_t block_tokens) {
  const bf16* source = from.data_ptr<bf16>();
  for (int64_t t = 0; t < from.size(0); t++)
    for (int64_t h = 0; h < from.size(1); h++)
      std::memcpy(pool.at(slots[t] / block_tokens, h) + slots[t] % block_tokens * pool.dim,
                  source + t * from.stride(0) + h * from.stride(1), pool.dim * sizeof(bf16));
}

// query [T, Hq, Dk], key [T, H, Dk], value [T, H, Dv] -> [T, Hq, Dv]. Rows [0, decodes) have one token each. window 0: all.
at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const at::Tensor& k_pool, const at::Tensor& v_pool, const at::Tensor& query_start,
                           const at::Tensor& kv_len, const at::Tensor& table, const at::Tensor& slots, int64_t decodes,
                           double scale, int64_t window, bool writes, bool amx) {
  check(query, 3, "query");
  check(key, 3, "key");
  check(value, 3, "value");
  const int64_t block_tokens = k_pool.size(2), dk = k_pool.size(3), dv = v_pool.size(3);
  TORCH_CHECK(block_tokens % kLanes == 0 && dk % 32 == 0 && dv % 32 == 0 && dv <= 256, "shapes this kernel has not: ",
              block_tokens, " tokens, ", dk, " and ", dv, " dims");
  const Places places = places_of(query_start, kv_len, table, slots, decodes);
  Step s = step_over(places, pool_of(k_pool), pool_of(v_pool), block_tokens, query.size(1), k_pool.size(1));
  if (writes) {
    write(key, s.k, places.slots, block_tokens);
    write(value, s.v, places.slots, block_tokens);
  }
  at::Tensor out = at::empty({query.size(0), query.size(1), dv}, query.options());
  s.scale = static_cast<float>(scale);
  s.window = window;
  s.query = query.data_ptr<bf16>();
  s.query_token = query.stride(0);
  s.query_head = query.stride(1);
  s.out = Out{out.data_ptr<bf16>(), s.heads * dv, false};
  attend(s, decodes, amx, workspace().packed);
  return out;
}

// Memory for packed weights, bytes of uint8 in huge pages where the system gives them: less of a stream is lost to page walks.
at::Tensor weight_memory(int64_t bytes) {
  constexpr size_t kHuge = size_t{2} << 20;
  const size_t size = (static_cast<size_t>(bytes) + 2 * kHuge - 1) / kHuge * kHuge + kHuge;
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(memory != MAP_FAILED, "no memory for ", bytes, " bytes of weights");
  const size_t start = (reinterpret_cast<size_t>(memory) + kHuge - 1) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(start), size - kHuge, MADV_HUGEPAGE);
  return at::from_blob(reinterpret_cast<void*>(start), {bytes}, [memory, size](void*) { munmap(memory, size); }, at::kByte);
}

// weight [N, K] into `to`, 2 N K bytes at a multiple of 64.
void pack_weight(const at::Tensor& weight, at::Tensor to) {
  check(weight, 2, "weight");
  const int64_t columns = weight.size(0), width = weight.size(1);
  TORCH_CHECK(columns % kPanel == 0 && width % 32 == 0, "a weight of ", columns, " x ", width, ": multiples of 32 are packed");
  TORCH_CHECK(to.numel() == 2 * columns * width && reinterpret_cast<size_t>(to.data_ptr()) % 64 == 0, "room for the packed weight");
  const at::Tensor rows = weight.contiguous();
  pack(rows.data_ptr<bf16>(), columns, width, reinterpret_cast<bf16*>(to.data_ptr()));
}

Weight weight_of(const at::Tensor& packed, int64_t columns, int64_t width) {
  TORCH_CHECK(packed.numel() == 2 * columns * width, "a packed weight of ", packed.numel(), " bytes, expected ",
              2 * columns * width);
  return Weight{reinterpret_cast<const bf16*>(packed.data_ptr()), columns, width};
}

// x [T, K] W^T -> float32 [T, N].
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, int64_t columns, bool amx) {
  check(x, 2, "x");
  const int64_t rows = x.size(0), width = x.size(1);
  const Weight w = weight_of(packed, columns, width);
  const Tiles tiles{aligned(workspace().x, Tiles::elements(rows, width)), width};
  for (int64_t t = 0; t < rows; t++)
    for (int64_t i = 0; i < width; i += kLanes)
      std::memcpy(tiles.at(t, i), x.data_ptr<bf16>() + t * x.stride(0) + i, kLanes * sizeof(bf16));
  at::Tensor y = at::empty({rows, columns}, x.options().dtype(at::kFloat));
  float* to = y.data_ptr<float>();
  gemm<1>(tiles, rows, w, amx, [&](int64_t panel, int64_t row, int64_t count, const float* c) {
    for (int64_t r = 0; r < count; r++)
      std::memcpy(to + (row + r) * columns + panel * kPanel, c + r * kPanel, kPanel * sizeof(float));
  });
  return y;
}

using Tensors = std::vector<at::Tensor>;
using Maybe = std::optional<at::Tensor>;

// `sizes`: hidden, heads, kv_heads, dim, middle, window, gelu, amx. `packed`: qkv, out, gate_up, down. `norms` float32: in,
// middle, q, k, attended, mlp; `biases` float32: qkv, out.
struct DecoderLayer : torch::CustomClassHolder {
  DecoderLayer(std::vector<int64_t> sizes, double scale, double eps, Tensors packed, std::vector<Maybe> norms,
               std::vector<Maybe> biases)
      : packed_(std::move(packed)), norms_(std::move(norms)), biases_(std::move(biases)), amx_(sizes.at(7)) {
    const Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6] != 0, static_cast<float>(scale),
                  static_cast<float>(eps)};
    const int64_t wide = s.heads * s.dim, all = wide + 2 * s.kv_heads * s.dim;
    layer_ = Layer{s,
                   weight_of(packed_.at(0), all, s.hidden),
                   weight_of(packed_.at(1), s.hidden, wide),
                   weight_of(packed_.at(2), 2 * s.middle, s.hidden),
                   weight_of(packed_.at(3), s.hidden, s.middle),
                   floats(biases_.at(0), all),
                   floats(biases_.at(1), s.hidden),
                   floats(norms_.at(0), s.hidden),
                   floats(norms_.at(1), s.hidden),
                   floats(norms_.at(2), s.dim),
                   floats(norms_.at(3), s.dim),
                   floats(norms_.at(4), s.hidden),
                   floats(norms_.at(5), s.hidden)};
    TORCH_CHECK(layer_.norm_in && layer_.norm_middle, "a layer without norms");
    TORCH_CHECK(s.dim % 32 == 0 && s.dim <= 256, "heads of ", s.dim, " dims: multiples of 32 to 256 are served");
  }

  // hidden [T, hidden], cos and sin [T, dim] -> [T, hidden]. `keep` int64: the rows that are wanted, the others are zeros; each
  // is the last token of its row.
  at::Tensor forward(const at::Tensor& hidden, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& query_start,
                     const at::Tensor& kv_len, const at::Tensor& table, const at::Tensor& slots, int64_t decodes,
                     const at::Tensor& k_pool, const at::Tensor& v_pool, const Maybe& keep) const {
    check(hidden, 2, "hidden");
    check(cos, 2, "cos");
    check(sin, 2, "sin");
    const int64_t tokens = hidden.size(0), dim = layer_.shape.dim;
    TORCH_CHECK(hidden.size(1) == layer_.shape.hidden && hidden.is_contiguous(), "hidden: wants [T, ", layer_.shape.hidden, "]");
    TORCH_CHECK(cos.size(0) == tokens && cos.size(1) == dim && cos.is_contiguous() && sin.sizes() == cos.sizes() &&
                    sin.is_contiguous() && slots.size(0) == tokens,
                "cos, sin [", tokens, ", ", dim, "] and slots [", tokens, "] expected");
    TORCH_CHECK(k_pool.size(2) % kLanes == 0 && k_pool.size(3) == dim && v_pool.size(3) == dim &&
                    k_pool.size(1) == layer_.shape.kv_heads,
                "a pool of another shape");
    const Kept kept{keep ? keep->data_ptr<int64_t>() : nullptr, keep ? keep->numel() : tokens};
    TORCH_CHECK(kept.count <= tokens && (!keep || !kept.count || kept.tokens[kept.count - 1] < tokens), "kept: ", kept.count,
                " tokens of ", tokens);
    const bool few = kept.count < tokens;
    at::Tensor to = few ? at::zeros_like(hidden) : at::empty_like(hidden);
    layer_.run(hidden.data_ptr<bf16>(), tokens, cos.data_ptr<bf16>(), sin.data_ptr<bf16>(),
               places_of(query_start, kv_len, table, slots, decodes), pool_of(k_pool), pool_of(v_pool), k_pool.size(2),
               few ? &kept : nullptr, amx_, workspace(), to.data_ptr<bf16>());
    return to;
  }

 private:
  static const float* floats(const Maybe& x, int64_t size) {
    if (!x) return nullptr;
    TORCH_CHECK(x->scalar_type() == at::kFloat && x->is_contiguous() && x->numel() == size, "wants float32 of ", size);
    return x->data_ptr<float>();
  }

  Tensors packed_;
  std::vector<Maybe> norms_, biases_;
  bool amx_;
  Layer layer_;
};

// Neighbouring layers with the same position embeddings as one call: each call from Python costs a step some 30 us.
struct DecoderRun : torch::CustomClassHolder {
  void add(const c10::intrusive_ptr<DecoderLayer>& layer) { layers_.push_back(layer); }

  // As DecoderLayer::forward, with a pool of K and V a layer; `keep` is for the last.
  at::Tensor forward(at::Tensor hidden, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& query_start,
                     const at::Tensor& kv_len, const at::Tensor& table, const at::Tensor& slots, int64_t decodes,
                     const Tensors& k_pools, const Tensors& v_pools, const Maybe& keep) const {
    const size_t count = layers_.size();
    TORCH_CHECK(k_pools.size() == count && v_pools.size() == count, count, " layers, pools for ", k_pools.size(), " and ",
                v_pools.size());
    for (size_t i = 0; i < count; i++)
      hidden = layers_[i]->forward(hidden, cos, sin, query_start, kv_len, table, slots, decodes, k_pools[i], v_pools[i],
                                   i + 1 == count ? keep : std::nullopt);
    return hidden;
  }

 private:
  std::vector<c10::intrusive_ptr<DecoderLayer>> layers_;
};

}  // namespace
}  // namespace splitserve

TORCH_LIBRARY(splitserve, library) {
  using namespace splitserve;
  library.def(
      "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor query_start, "
      "Tensor kv_len, Tensor table, Tensor slots, int decodes, float scale, int window, bool writes, bool amx) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, int columns, bool amx) -> Tensor");
  library.def("pack_weight(Tensor weight, Tensor(a!) to) -> ()", pack_weight);
  library.def("weight_memory(int bytes) -> Tensor", weight_memory);
  library.def("amx_allowed() -> bool", amx_allowed);
  library.class_<DecoderLayer>("DecoderLayer")
      .def(torch::init<std::vector<int64_t>, double, double, Tensors, std::vector<Maybe>, std::vector<Maybe>>());
  library.class_<DecoderRun>("DecoderRun")
      .def(torch::init<>())
      .def("add", &DecoderRun::add)
      .def("forward", &DecoderRun::forward);
}

TORCH_LIBRARY_IMPL(splitserve, CPU, library) {
  library.impl("paged_attention", splitserve::paged_attention);
  library.impl("linear", splitserve::linear);
}
