// Registers the CPU kernels of group_norm_act. The schemas are in imagen_fast/ops/group_norm_act.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/cpu_capability.h"
#include "arguments.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void group_norm_act_forward(const group_norm_act::Forward&))
IMAGEN_FAST_DECLARE_KERNEL(void group_norm_act_backward(const group_norm_act::Backward&))

namespace group_norm_act {
namespace {

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
  Forward f{
      p, eps, x.const_data_ptr(), nullptr, 0, y.mutable_data_ptr(), mean.mutable_data_ptr(), rstd.mutable_data_ptr()};
  IMAGEN_FAST_KERNEL(group_norm_act_forward, f.dtype)(f);
  return {y, mean, rstd};
}

// The norm of x and skip beside each other in their channels; both lie channels-last.
Tensor forward_joined(const Tensor& x, const Tensor& skip, int64_t num_groups, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, int64_t activation, double eps) {
  bool alike = x.dim() == 4 && skip.dim() == 4 && dtype_code(x) == dtype_code(skip);
  for (int64_t i : {0, 2, 3}) alike = alike && x.size(i) == skip.size(i);
  STD_TORCH_CHECK(alike, kOp, ": x and skip must be (B, C, H, W), alike but for their channels");
  const auto lies_channels_last = [](const Tensor& tensor) {
    return is_channels_last(kOp, tensor) || tensor.size(1) == 1 || tensor.size(2) * tensor.size(3) == 1 ||
           tensor.numel() == 0;
  };
  STD_TORCH_CHECK(lies_channels_last(x) && lies_channels_last(skip), kOp, ": x and skip must be channels-last");
  Problem p = problem(x, num_groups, weight, bias, {}, {}, activation, skip.size(1));
  p.channels_last = true;
  const int64_t height = x.size(2), width = x.size(3);
  const int64_t sizes[] = {p.batch, p.channels, height, width};
  const int64_t strides[] = {height * width * p.channels, 1, width * p.channels, p.channels};
  Tensor y = uninitialized({sizes, 4}, {strides, 4}, dtype_code(x));
  Tensor mean = uninitialized_matrix(p.batch, p.groups, statistics_dtype(p));
  Tensor rstd = uninitialized_matrix(p.batch, p.groups, statistics_dtype(p));
  if (x.numel() == 0 || skip.numel() == 0) {
    STD_TORCH_CHECK(y.numel() == 0, kOp, ": x and skip must both have channels");
    return y;
  }
  Forward f{p,
            eps,
            x.const_data_ptr(),
            skip.const_data_ptr(),
            skip.size(1),
            y.mutable_data_ptr(),
            mean.mutable_data_ptr(),
            rstd.mutable_data_ptr()};
  IMAGEN_FAST_KERNEL(group_norm_act_forward, f.dtype)(f);
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of x, weight, bias, scale and shift; `needs` has a bit for each, the lowest for x.
Gradients backward(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t activation,
                   int64_t needs) {
  Backward f{problem(x, num_groups, weight, bias, scale, shift, activation), {}, {}, {}, {}, {}, {}};
  check_gradient(kOp, dy, x);
  check_statistics(kOp, f, "mean", mean, f.batch * f.groups);
  check_statistics(kOp, f, "rstd", rstd, f.batch * f.groups);
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
  IMAGEN_FAST_KERNEL(group_norm_act_backward, f.dtype)(f);
  return {dx, dweight, dbias, dscale, dshift};
}

}  // namespace
}  // namespace group_norm_act
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("group_norm_act_cpu", TORCH_BOX(&imagen_fast::group_norm_act::forward));
  library.impl("_group_norm_act_joined_cpu", TORCH_BOX(&imagen_fast::group_norm_act::forward_joined));
  library.impl("group_norm_act_backward_cpu", TORCH_BOX(&imagen_fast::group_norm_act::backward));
}
