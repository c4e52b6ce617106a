// What the registrations of the norms share: tensors in, a NormProblem out. `op` is what errors begin with. (The checks
// that tell users what to pass instead are in Python; these keep direct calls of an operator within bounds.)
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "norm_problem.h"
#include "tensor.h"

namespace imagen_fast {

// Channels and positions are counted in memory order: (B, C, …) contiguous, or all of a position's channels together.
inline bool is_channels_last(const char* op, const Tensor& x) {
  if (x.is_contiguous()) return false;
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  int64_t expected = sizes[1];
  bool dense = sizes[1] == 1 || strides[1] == 1;
  for (size_t i = sizes.size() - 1; i >= 2; --i) {
    dense = dense && (sizes[i] == 1 || strides[i] == expected);
    expected *= sizes[i];
  }
  dense = dense && (sizes[0] == 1 || strides[0] == expected);
  STD_TORCH_CHECK(dense, op, ": x must be dense, contiguous or channels-last");
  return true;
}

// Everything but the parameters
inline NormProblem norm_problem(const char* op, const Tensor& x, int64_t activation) {
  STD_TORCH_CHECK(x.dim() >= 2, op, ": x must have at least 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::kGeluTanh), op,
                  ": no activation has the code ", activation);
  NormProblem p;
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.positions = 1;
  for (int64_t i = 2; i < x.dim(); ++i) p.positions *= x.size(i);
  // With one position the layouts are the same, and vectors are better filled along the channels.
  p.channels_last = is_channels_last(op, x) || p.positions == 1;
  p.activation = static_cast<Activation>(activation);
  return p;
}

inline void check_parameter(const char* op, const NormProblem& p, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK((dtype_of(tensor) == DType::kDouble) == (p.dtype == DType::kDouble), op, ": ", name,
                  " must be float64 if and only if x is");
}

// (C,), any stride
inline Parameter per_channel(const char* op, const NormProblem& p, const char* name,
                             const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  check_parameter(op, p, name, *tensor);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == p.channels, op, ": ", name,
                  " must have shape (C,), C = ", p.channels);
  return {tensor->const_data_ptr(), dtype_of(*tensor), 0, tensor->stride(0)};
}

// (B, C), any strides
inline Parameter per_sample(const char* op, const NormProblem& p, const char* name,
                            const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  check_parameter(op, p, name, *tensor);
  STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == p.batch && tensor->size(1) == p.channels, op, ": ", name,
                  " must have shape (B, C), B = ", p.batch, ", C = ", p.channels);
  return {tensor->const_data_ptr(), dtype_of(*tensor), tensor->stride(0), tensor->stride(1)};
}

inline int32_t statistics_dtype(const NormProblem& p) {
  return p.dtype == DType::kDouble ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline void check_statistics(const char* op, const NormProblem& p, const char* name, const Tensor& tensor,
                             int64_t size) {
  STD_TORCH_CHECK(tensor.numel() == size && tensor.is_contiguous() && dtype_code(tensor) == statistics_dtype(p), op,
                  ": ", name, " must be as the forward pass returned it");
}

// dy has x's shape, dtype and memory layout.
inline void check_gradient(const char* op, const Tensor& dy, const Tensor& x) {
  bool alike = dy.dim() == x.dim() && dtype_code(dy) == dtype_code(x);
  for (int64_t i = 0; alike && i < x.dim(); ++i) alike = dy.size(i) == x.size(i);
  STD_TORCH_CHECK(alike, op, ": dy must have the shape and dtype of x");
  if (x.numel() == 0) return;
  const bool same_layout = is_channels_last(op, dy) == is_channels_last(op, x);
  STD_TORCH_CHECK(same_layout || x.numel() == x.size(0) * x.size(1), op, ": dy must have the memory layout of x");
}

// An output of the shape and dtype of `parameter`, contiguous, and where the kernel writes it; empty if not `needed`
inline Tensor gradient_of(const std::optional<Tensor>& parameter, bool needed, ParameterGradient* to) {
  if (!needed || !parameter) return uninitialized_vector(0, aoti_torch_dtype_float32());
  const int32_t dtype = dtype_code(*parameter);
  Tensor gradient = parameter->dim() == 1 ? uninitialized_vector(parameter->size(0), dtype)
                                          : uninitialized_matrix(parameter->size(0), parameter->size(1), dtype);
  *to = {gradient.mutable_data_ptr(), dtype_of(*parameter)};
  return gradient;
}

}  // namespace imagen_fast
