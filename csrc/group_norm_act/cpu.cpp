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
  Forward f{p, eps, x.const_data_ptr(), y.mutable_data_ptr(), mean.mutable_data_ptr(), rstd.mutable_data_ptr()};
  IMAGEN_FAST_KERNEL(group_norm_act_forward, f.dtype)(f);
  return {y, mean, rstd};
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
  library.impl("group_norm_act_backward_cpu", TORCH_BOX(&imagen_fast::group_norm_act::backward));
}
