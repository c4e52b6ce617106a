// Registers the CPU kernels of group_norm_act. The schemas, and the checks that tell users what to pass instead, are in
// imagen_fast/ops/group_norm_act.py; the checks here keep direct calls of the operators from reading out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../common/cpu_capability.h"
#include "../common/tensor.h"
#include "problem.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void group_norm_act_forward(const group_norm_act::Forward&))
IMAGEN_FAST_DECLARE_KERNEL(void group_norm_act_backward(const group_norm_act::Backward&))

namespace group_norm_act {
namespace {

// Channels and positions are counted in memory order: (B, C, …) contiguous, or all of a position's channels together.
bool is_channels_last(const Tensor& x) {
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
  STD_TORCH_CHECK(dense, "group_norm_act: x must be dense, contiguous or channels-last");
  return true;
}

void check_parameter(const Problem& p, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK((dtype_of(tensor) == DType::kDouble) == (p.dtype == DType::kDouble), "group_norm_act: ", name,
                  " must be float64 if and only if x is");
}

Parameter per_channel(const Problem& p, const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  check_parameter(p, name, *tensor);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == p.channels, "group_norm_act: ", name,
                  " must have shape (C,), C = ", p.channels);
  return {tensor->const_data_ptr(), dtype_of(*tensor), 0, tensor->stride(0)};
}

Parameter per_sample(const Problem& p, const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  check_parameter(p, name, *tensor);
  STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == p.batch && tensor->size(1) == p.channels,
                  "group_norm_act: ", name, " must have shape (B, C), B = ", p.batch, ", C = ", p.channels);
  return {tensor->const_data_ptr(), dtype_of(*tensor), tensor->stride(0), tensor->stride(1)};
}

Problem problem(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& shift, int64_t activation) {
  STD_TORCH_CHECK(x.dim() >= 2, "group_norm_act: x must have at least 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::kGeluTanh),
                  "group_norm_act: no activation has the code ", activation);
  Problem p;
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.positions = 1;
  for (int64_t i = 2; i < x.dim(); ++i) p.positions *= x.size(i);
  // With one position the layouts are the same, and vectors are better filled along the channels.
  p.channels_last = is_channels_last(x) || p.positions == 1;
  p.groups = num_groups;
  p.activation = static_cast<Activation>(activation);
  p.parameters.weight = per_channel(p, "weight", weight);
  p.parameters.bias = per_channel(p, "bias", bias);
  p.parameters.scale = per_sample(p, "scale", scale);
  p.parameters.shift = per_sample(p, "shift", shift);
  STD_TORCH_CHECK(num_groups > 0 && p.channels % num_groups == 0, "group_norm_act: ", num_groups,
                  " groups do not divide ", p.channels, " channels");
  return p;
}

int32_t statistics_dtype(const Problem& p) {
  return p.dtype == DType::kDouble ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

void check_statistics(const Problem& p, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.numel() == p.batch * p.groups && tensor.is_contiguous() && dtype_code(tensor) == statistics_dtype(p),
      "group_norm_act: ", name, " must be as the forward pass returned it");
}

// Of x's shape, dtype and memory layout
void check_gradient(const Tensor& dy, const Tensor& x) {
  bool alike = dy.dim() == x.dim() && dtype_code(dy) == dtype_code(x);
  for (int64_t i = 0; alike && i < x.dim(); ++i) alike = dy.size(i) == x.size(i);
  STD_TORCH_CHECK(alike, "group_norm_act: dy must have the shape and dtype of x");
  if (x.numel() == 0) return;
  const bool same_layout = is_channels_last(dy) == is_channels_last(x);
  STD_TORCH_CHECK(same_layout || x.numel() == x.size(0) * x.size(1),
                  "group_norm_act: dy must have the memory layout of x");
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                                           const std::optional<Tensor>& shift, int64_t activation, double eps) {
  const Problem p = problem(x, num_groups, weight, bias, scale, shift, activation);
  Tensor y = uninitialized_like(x);
  Tensor mean = uninitialized_matrix(p.batch, p.groups, statistics_dtype(p));
  Tensor rstd = uninitialized_matrix(p.batch, p.groups, statistics_dtype(p));
  if (x.numel() == 0) {
    torch::stable::fill_(mean, 0);
    torch::stable::fill_(rstd, 0);
    return {y, mean, rstd};
  }
  Forward f{p, eps, x.const_data_ptr(), y.mutable_data_ptr(), mean.mutable_data_ptr(), rstd.mutable_data_ptr()};
  IMAGEN_FAST_KERNEL(group_norm_act_forward)(f);
  return {y, mean, rstd};
}

// An output of the shape and dtype of `parameter`, contiguous, and where the kernel writes it; empty if not `needed`
Tensor gradient_of(const std::optional<Tensor>& parameter, bool needed, ParameterGradient* to) {
  if (!needed || !parameter) return uninitialized_vector(0, aoti_torch_dtype_float32());
  Tensor gradient = parameter->dim() == 1
                        ? uninitialized_vector(parameter->size(0), dtype_code(*parameter))
                        : uninitialized_matrix(parameter->size(0), parameter->size(1), dtype_code(*parameter));
  *to = {gradient.mutable_data_ptr(), dtype_of(*parameter)};
  return gradient;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of x, weight, bias, scale and shift; `needs` has a bit for each, the lowest for x.
Gradients backward(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t activation,
                   int64_t needs) {
  Backward f{problem(x, num_groups, weight, bias, scale, shift, activation), {}, {}, {}, {}, {}, {}};
  check_gradient(dy, x);
  check_statistics(f, "mean", mean);
  check_statistics(f, "rstd", rstd);
  Tensor dx = needs & 1 ? uninitialized_like(x) : uninitialized_vector(0, dtype_code(x));
  Tensor dweight = gradient_of(weight, needs & 2, &f.gradients.weight);
  Tensor dbias = gradient_of(bias, needs & 4, &f.gradients.bias);
  Tensor dscale = gradient_of(scale, needs & 8, &f.gradients.scale);
  Tensor dshift = gradient_of(shift, needs & 16, &f.gradients.shift);
  if (x.numel() == 0) {
    for (Tensor* sum : {&dweight, &dbias, &dscale, &dshift}) torch::stable::fill_(*sum, 0);
    return {dx, dweight, dbias, dscale, dshift};
  }
  f.dy = dy.const_data_ptr();
  f.x = x.const_data_ptr();
  f.mean = mean.const_data_ptr();
  f.rstd = rstd.const_data_ptr();
  f.dx = needs & 1 ? dx.mutable_data_ptr() : nullptr;
  IMAGEN_FAST_KERNEL(group_norm_act_backward)(f);
  return {dx, dweight, dbias, dscale, dshift};
}

}  // namespace
}  // namespace group_norm_act
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("group_norm_act_cpu", TORCH_BOX(&imagen_fast::group_norm_act::forward));
  library.impl("group_norm_act_backward_cpu", TORCH_BOX(&imagen_fast::group_norm_act::backward));
}
