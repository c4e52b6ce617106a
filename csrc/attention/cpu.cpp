// Registers the CPU kernels of attention. Schemas, and the checks that tell users what to pass instead, are in
// imagen_fast/ops; the checks here keep direct calls of the operators from reading out of bounds.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/cpu_capability.h"
#include "../common/tensor.h"
#include "problem.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void attention_forward(const attention::Forward&))
IMAGEN_FAST_DECLARE_KERNEL(void attention_backward(const attention::Backward&))
IMAGEN_FAST_DECLARE_KERNEL(void attention_bias_gradient(const attention::Backward&))

namespace attention {
namespace {

using Optional = std::optional<Tensor>;

bool has_sizes(const Tensor& x, std::initializer_list<int64_t> sizes) {
  const auto own = x.sizes();
  return own.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), own.begin());
}

HeadRows rows(const Problem& p, const char* name, const Tensor& x, int64_t heads, int64_t length) {
  STD_TORCH_CHECK(
      has_sizes(x, {p.batch, heads, length, p.width}) && dtype_of(x) == p.dtype && (x.stride(3) == 1 || x.numel() == 0),
      "attention: ", name, " must have q's dtype and shape (", p.batch, ", ", heads, ", ", length, ", ", p.width,
      "), with the last dimension dense");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

void check_parameter(const Problem& p, const char* name, const Tensor& x) {
  STD_TORCH_CHECK((dtype_of(x) == DType::kDouble) == (p.dtype == DType::kDouble), "attention: ", name,
                  " must be float64 if and only if q is");
}

Bias tensor_bias(const Problem& p, const Optional& bias) {
  if (!bias) return {};
  check_parameter(p, "bias", *bias);
  const int64_t full[] = {p.batch, p.q_heads, p.queries, p.keys()};
  int64_t strides[4] = {};
  STD_TORCH_CHECK(bias->dim() == 4, "attention: bias must have 4 dimensions");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(bias->size(i) == 1 || bias->size(i) == full[i], "attention: bias must broadcast to ", full[0],
                    " x ", full[1], " x ", full[2], " x ", full[3]);
    if (bias->size(i) > 1) strides[i] = bias->stride(i);
  }
  STD_TORCH_CHECK(strides[3] <= 1 && strides[3] >= 0, "attention: the last dimension of bias must be dense");
  return {bias->const_data_ptr(), dtype_of(*bias), strides[0], strides[1], strides[2], strides[3]};
}

RelativeBias relative_bias(const Problem& p, const Optional& table, const Optional& buckets) {
  if (!table) return {};
  check_parameter(p, "table", *table);
  STD_TORCH_CHECK(!p.bias.data, "attention: a table and a bias exclude each other");
  STD_TORCH_CHECK(table->dim() == 2 && table->size(1) == p.q_heads && table->is_contiguous(),
                  "attention: table must be (rows, ", p.q_heads, ") and contiguous");
  const int64_t diagonals = std::max<int64_t>(p.queries + p.own - 1, 0);
  STD_TORCH_CHECK(buckets && has_sizes(*buckets, {diagonals}) && buckets->is_contiguous() &&
                      buckets->scalar_type() == torch::headeronly::ScalarType::Int,
                  "attention: buckets must be int32 of size ", diagonals);
  const auto* const bucket = static_cast<const int32_t*>(buckets->const_data_ptr());
  const int64_t table_rows = table->size(0);
  STD_TORCH_CHECK(std::all_of(bucket, bucket + diagonals, [&](int32_t b) { return b >= 0 && b < table_rows; }),
                  "attention: buckets must be rows of the table, 0 to ", table_rows - 1);
  return {table->const_data_ptr(), dtype_of(*table), table_rows, bucket};
}

Parameter width_scale(const Problem& p, const char* name, const Optional& scale) {
  if (!scale) return {};
  check_parameter(p, name, *scale);
  STD_TORCH_CHECK(has_sizes(*scale, {p.width}) && scale->is_contiguous(), "attention: ", name, " must be (", p.width,
                  ",) and contiguous");
  return {scale->const_data_ptr(), dtype_of(*scale), 0, 1};
}

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& context_k, const Optional& context_v,
                const Optional& bias, const Optional& table, const Optional& buckets, const Optional& key_mask,
                const Optional& q_scale, const Optional& k_scale, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "attention: q and k must have 4 dimensions");
  STD_TORCH_CHECK(context_k.has_value() == context_v.has_value(), "attention: context_k and context_v go together");
  STD_TORCH_CHECK(q_scale.has_value() == k_scale.has_value(), "attention: q_scale and k_scale go together");
  STD_TORCH_CHECK(!context_k || context_k->dim() == 4, "attention: context_k must have 4 dimensions");
  Problem p;
  p.dtype = dtype_of(q);
  p.batch = q.size(0);
  p.q_heads = q.size(1);
  p.kv_heads = k.size(1);
  p.queries = q.size(2);
  p.context = context_k ? context_k->size(2) : 0;
  p.own = k.size(2);
  p.width = q.size(3);
  p.scale = scale;
  STD_TORCH_CHECK(p.kv_heads > 0 && p.q_heads % p.kv_heads == 0, "attention: the heads of k must divide those of q");
  STD_TORCH_CHECK(p.width > 0 && p.width % 8 == 0, "attention: the head width must be a multiple of 8");
  p.q = rows(p, "q", q, p.q_heads, p.queries);
  p.k = rows(p, "k", k, p.kv_heads, p.own);
  p.v = rows(p, "v", v, p.kv_heads, p.own);
  if (context_k) p.context_k = rows(p, "context_k", *context_k, p.kv_heads, p.context);
  if (context_v) p.context_v = rows(p, "context_v", *context_v, p.kv_heads, p.context);
  p.bias = tensor_bias(p, bias);
  p.relative = relative_bias(p, table, buckets);
  if (key_mask) {
    STD_TORCH_CHECK(has_sizes(*key_mask, {p.batch, p.keys()}) && (p.keys() <= 1 || key_mask->stride(1) == 1) &&
                        key_mask->scalar_type() == torch::headeronly::ScalarType::Bool,
                    "attention: key_mask must be bool of shape (", p.batch, ", ", p.keys(), ")");
    p.key_mask = static_cast<const bool*>(key_mask->const_data_ptr());
    p.key_mask_stride = key_mask->stride(0);
  }
  p.q_scale = width_scale(p, "q_scale", q_scale);
  p.k_scale = width_scale(p, "k_scale", k_scale);
  return p;
}

// Of these sizes, in x's memory order: (B, L, H, D) or (B, H, L, D)
Tensor uninitialized_in_order_of(const Tensor& x) {
  const int64_t sizes[] = {x.size(0), x.size(1), x.size(2), x.size(3)};
  const auto at_least_1 = [](int64_t size) { return std::max<int64_t>(size, 1); };
  const int64_t width = at_least_1(sizes[3]), heads = at_least_1(sizes[1]), length = at_least_1(sizes[2]);
  const bool heads_are_inner = x.stride(1) < x.stride(2);
  const int64_t strides[] = {heads * length * width, heads_are_inner ? width : length * width,
                             heads_are_inner ? heads * width : width, 1};
  return uninitialized({sizes, 4}, {strides, 4}, dtype_code(x));
}

HeadOutput output_rows(Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Tensor uninitialized_lse(const Problem& p) {
  const int64_t sizes[] = {p.batch, p.q_heads, p.queries};
  const int64_t rows = std::max<int64_t>(p.queries, 1);
  const int64_t strides[] = {std::max<int64_t>(p.q_heads, 1) * rows, rows, 1};
  const bool wide = p.dtype == DType::kDouble;
  return uninitialized({sizes, 3}, {strides, 3}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& context_k,
                                   const Optional& context_v, const Optional& bias, const Optional& table,
                                   const Optional& buckets, const Optional& key_mask, const Optional& q_scale,
                                   const Optional& k_scale, double scale) {
  Forward f{
      problem(q, k, v, context_k, context_v, bias, table, buckets, key_mask, q_scale, k_scale, scale), {}, {}, {}};
  Tensor out = uninitialized_in_order_of(q);
  Tensor lse = uninitialized_lse(f);
  if (out.numel() == 0) return {out, lse};
  f.out = output_rows(out);
  f.lse = lse.mutable_data_ptr();
  f.matrix_tiles = matrix_tiles();
  IMAGEN_FAST_KERNEL(attention_forward)(f);
  return {out, lse};
}

// The gradients in the order in which the operator returns them; those that are not needed have no elements.
class Gradients {
 public:
  Gradients(int64_t needs, const Tensor& q) : needs_(needs), dtype_(dtype_code(q)) {}

  // In the memory order of x, which is there if the gradient is needed
  HeadOutput add_rows(const Optional& x) { return add(x, true) ? output_rows(all_.back()) : HeadOutput{}; }

  ParameterGradient add_parameter(const Optional& x) {
    if (!add(x, false)) return {};
    return {all_.back().mutable_data_ptr(), dtype_of(*x)};
  }

  BiasGradient add_bias(const Optional& x) {
    if (!add(x, false)) return {};
    return {all_.back().mutable_data_ptr(), dtype_of(*x), x->size(0), x->size(1), x->size(2), x->size(3)};
  }

  const Tensor& operator[](size_t i) const { return all_[i]; }

 private:
  bool add(const Optional& x, bool in_order) {
    const bool needed = x && (needs_ >> all_.size() & 1);
    all_.push_back(!needed    ? uninitialized_vector(0, dtype_)
                   : in_order ? uninitialized_in_order_of(*x)
                              : uninitialized_contiguous(*x));
    return needed && all_.back().numel() > 0;
  }

  static Tensor uninitialized_contiguous(const Tensor& x) {
    const auto sizes = x.sizes();
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
    return uninitialized(sizes, {strides.data(), strides.size()}, dtype_code(x));
  }

  const int64_t needs_;
  const int32_t dtype_;
  std::vector<Tensor> all_;
};

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors backward(const Tensor& dout, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
                     const Tensor& v, const Optional& context_k, const Optional& context_v, const Optional& bias,
                     const Optional& table, const Optional& buckets, const Optional& key_mask, const Optional& q_scale,
                     const Optional& k_scale, double scale, int64_t needs) {
  Backward f{};
  static_cast<Problem&>(f) =
      problem(q, k, v, context_k, context_v, bias, table, buckets, key_mask, q_scale, k_scale, scale);
  f.dout = rows(f, "dout", dout, f.q_heads, f.queries);
  f.out = rows(f, "out", out, f.q_heads, f.queries);
  STD_TORCH_CHECK(has_sizes(lse, {f.batch, f.q_heads, f.queries}) && lse.is_contiguous() &&
                      dtype_of(lse) == (f.dtype == DType::kDouble ? DType::kDouble : DType::kFloat),
                  "attention: lse must be as the forward pass returned it");
  f.lse = lse.const_data_ptr();
  Gradients gradients(needs, q);
  f.dq = gradients.add_rows(q);
  f.dk = gradients.add_rows(k);
  f.dv = gradients.add_rows(v);
  f.dcontext_k = gradients.add_rows(context_k);
  f.dcontext_v = gradients.add_rows(context_v);
  f.dbias = gradients.add_bias(bias);
  f.dtable = gradients.add_parameter(table);
  f.dq_scale = gradients.add_parameter(q_scale);
  f.dk_scale = gradients.add_parameter(k_scale);
  IMAGEN_FAST_KERNEL(attention_backward)(f);
  if (f.dbias.data && !f.has_bias_of_each_score()) IMAGEN_FAST_KERNEL(attention_bias_gradient)(f);
  const Gradients& g = gradients;
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]};
}

}  // namespace
}  // namespace attention
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("attention_cpu", TORCH_BOX(&imagen_fast::attention::forward));
  library.impl("attention_backward_cpu", TORCH_BOX(&imagen_fast::attention::backward));
}
