// What the operators of the CPU and of CUDA make of their arguments, and the tensors that they return. Schemas, and the
// checks that tell users what to pass instead, are in imagen_fast/ops; the checks here keep direct calls of the
// operators from reading out of bounds.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensor.h"
#include "problem.h"

namespace imagen_fast::attention {

using Optional = std::optional<Tensor>;

inline bool has_sizes(const Tensor& x, std::initializer_list<int64_t> sizes) {
  const auto own = x.sizes();
  return own.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), own.begin());
}

inline HeadRows rows(const Problem& p, const char* name, const Tensor& x, int64_t heads, int64_t length) {
  STD_TORCH_CHECK(
      has_sizes(x, {p.batch, heads, length, p.width}) && dtype_of(x) == p.dtype && (x.stride(3) == 1 || x.numel() == 0),
      "attention: ", name, " must have q's dtype and shape (", p.batch, ", ", heads, ", ", length, ", ", p.width,
      "), with the last dimension dense");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline void check_parameter(const Problem& p, const char* name, const Tensor& x) {
  STD_TORCH_CHECK((dtype_of(x) == DType::kDouble) == (p.dtype == DType::kDouble), "attention: ", name,
                  " must be float64 if and only if q is");
}

inline Bias tensor_bias(const Problem& p, const Optional& bias) {
  if (!bias) return {};
  check_parameter(p, "bias", *bias);
  const int64_t full[] = {p.batch, p.q_heads, p.queries, p.keys()};
  int64_t strides[4] = {};
  STD_TORCH_CHECK(bias->dim() == 4, "attention: bias must have 4 dimensions");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(bias->size(i) == 1 || bias->size(i) == full[i], "attention: bias must broadcast to ", full[0],
                    " x ", full[1], " x ", full[2], " x ", full[3]);
    if (bias->size(i) > 1 && bias->numel() > 0) strides[i] = bias->stride(i);
  }
  STD_TORCH_CHECK(strides[3] <= 1 && strides[3] >= 0, "attention: the last dimension of bias must be dense");
  return {bias->const_data_ptr(), dtype_of(*bias), strides[0], strides[1], strides[2], strides[3]};
}

inline RelativeBias relative_bias(const Problem& p, const Optional& table, const Optional& buckets) {
  if (!table) return {};
  check_parameter(p, "table", *table);
  STD_TORCH_CHECK(!p.bias.data, "attention: a table and a bias exclude each other");
  STD_TORCH_CHECK(table->dim() == 2 && table->size(1) == p.q_heads && table->is_contiguous(),
                  "attention: table must be (rows, ", p.q_heads, ") and contiguous");
  STD_TORCH_CHECK(table->size(0) > 0, "attention: table must have rows");
  const int64_t diagonals = std::max<int64_t>(p.queries + p.own - 1, 0);
  STD_TORCH_CHECK(buckets && has_sizes(*buckets, {diagonals}) && buckets->is_contiguous() &&
                      buckets->scalar_type() == torch::headeronly::ScalarType::Int,
                  "attention: buckets must be int32 of size ", diagonals);
  return {table->const_data_ptr(), dtype_of(*table), table->size(0),
          static_cast<const int32_t*>(buckets->const_data_ptr())};
}

inline Parameter width_scale(const Problem& p, const char* name, const Optional& scale) {
  if (!scale) return {};
  check_parameter(p, name, *scale);
  STD_TORCH_CHECK(has_sizes(*scale, {p.width}) && scale->is_contiguous(), "attention: ", name, " must be (", p.width,
                  ",) and contiguous");
  return {scale->const_data_ptr(), dtype_of(*scale), 0, 1};
}

inline Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& context_k,
                       const Optional& context_v, const Optional& bias, const Optional& table, const Optional& buckets,
                       const Optional& key_mask, const Optional& q_scale, const Optional& k_scale, double scale) {
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
    const bool dense = p.keys() <= 1 || key_mask->stride(1) == 1 || key_mask->numel() == 0;
    STD_TORCH_CHECK(has_sizes(*key_mask, {p.batch, p.keys()}) && dense &&
                        key_mask->scalar_type() == torch::headeronly::ScalarType::Bool,
                    "attention: key_mask must be bool of shape (", p.batch, ", ", p.keys(),
                    "), with the last dimension dense");
    p.key_mask = static_cast<const bool*>(key_mask->const_data_ptr());
    p.key_mask_stride = key_mask->stride(0);
  }
  p.q_scale = width_scale(p, "q_scale", q_scale);
  p.k_scale = width_scale(p, "k_scale", k_scale);
  return p;
}

// Makes a tensor on the device of `like`, uninitialised.
using Allocate = Tensor (*)(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype);

// Of x's dtype and sizes, in its memory order: (B, L, H, D) or (B, H, L, D)
inline Tensor empty_in_order_of(const Tensor& x, Allocate allocate) {
  const int64_t sizes[] = {x.size(0), x.size(1), x.size(2), x.size(3)};
  const auto at_least_1 = [](int64_t size) { return std::max<int64_t>(size, 1); };
  const int64_t width = at_least_1(sizes[3]), heads = at_least_1(sizes[1]), length = at_least_1(sizes[2]);
  const bool heads_are_inner = x.stride(1) < x.stride(2);
  const int64_t strides[] = {heads * length * width, heads_are_inner ? width : length * width,
                             heads_are_inner ? heads * width : width, 1};
  return allocate(x, {sizes, 4}, {strides, 4}, dtype_code(x));
}

// Of these sizes, contiguous
inline Tensor empty_contiguous(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, int32_t dtype,
                               Allocate allocate) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return allocate(like, sizes, {strides.data(), strides.size()}, dtype);
}

inline HeadOutput output_rows(Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

inline Tensor empty_lse(const Problem& p, const Tensor& q, Allocate allocate) {
  const int64_t sizes[] = {p.batch, p.q_heads, p.queries};
  const bool wide = p.dtype == DType::kDouble;
  return empty_contiguous(q, {sizes, 3}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), allocate);
}

inline void check_lse(const Problem& p, const Tensor& lse) {
  STD_TORCH_CHECK(has_sizes(lse, {p.batch, p.q_heads, p.queries}) && lse.is_contiguous() &&
                      dtype_of(lse) == (p.dtype == DType::kDouble ? DType::kDouble : DType::kFloat),
                  "attention: lse must be as the forward pass returned it");
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradients in the order in which the operator returns them; those that are not needed have no elements.
class Gradients {
 public:
  Gradients(int64_t needs, const Tensor& q, Allocate allocate) : needs_(needs), q_(q), allocate_(allocate) {}

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

  std::vector<Tensor>& all() { return all_; }

  NineTensors result() const {
    const auto& g = all_;
    return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]};
  }

 private:
  bool add(const Optional& x, bool in_order) {
    const bool needed = x && (needs_ >> all_.size() & 1);
    const int64_t nothing = 0;
    all_.push_back(!needed    ? empty_contiguous(q_, {&nothing, 1}, dtype_code(q_), allocate_)
                   : in_order ? empty_in_order_of(*x, allocate_)
                              : empty_contiguous(*x, x->sizes(), dtype_code(*x), allocate_));
    return needed && all_.back().numel() > 0;
  }

  const int64_t needs_;
  const Tensor q_;
  const Allocate allocate_;
  std::vector<Tensor> all_;
};

}  // namespace imagen_fast::attention
