// Registers the CPU kernels of channel_rms_norm_act. The schemas are in imagen_fast/ops/channel_rms_norm_act.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/cpu_capability.h"
#include "arguments.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void channel_rms_norm_act_forward(const channel_rms_norm_act::Forward&))
IMAGEN_FAST_DECLARE_KERNEL(void channel_rms_norm_act_backward(const channel_rms_norm_act::Backward&))

namespace channel_rms_norm_act {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                   const std::optional<Tensor>& shift, int64_t activation) {
  Forward f{problem(x, weight, scale, shift, activation), {}, {}, {}};
  Tensor y = uninitialized_like(x);
  Tensor rstd = uninitialized_matrix(f.batch, f.positions, statistics_dtype(f));
  if (x.numel() == 0) return {y, rstd};
  f.x = x.const_data_ptr();
  f.y = y.mutable_data_ptr();
  f.rstd = rstd.mutable_data_ptr();
  IMAGEN_FAST_KERNEL(channel_rms_norm_act_forward, f.dtype)(f);
  return {y, rstd};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Of x, weight, scale and shift; `needs` has a bit for each, the lowest for x.
Gradients backward(const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& weight,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t activation,
                   int64_t needs) {
  Backward f{problem(x, weight, scale, shift, activation), {}, {}, {}, {}, {}};
  check_gradient(kOp, dy, x);
  check_statistics(kOp, f, "rstd", rstd, f.batch * f.positions);
  Tensor dx = needs & 1 ? uninitialized_like(x) : uninitialized_vector(0, dtype_code(x));
  Tensor dweight = gradient_of(weight, needs & 2, &f.gradients.weight);
  Tensor dscale = gradient_of(scale, needs & 4, &f.gradients.scale);
  Tensor dshift = gradient_of(shift, needs & 8, &f.gradients.shift);
  if (x.numel() == 0) {
    for (Tensor* sum : {&dweight, &dscale, &dshift}) torch::stable::fill_(*sum, 0);
    return {dx, dweight, dscale, dshift};
  }
  f.dy = dy.const_data_ptr();
  f.x = x.const_data_ptr();
  f.rstd = rstd.const_data_ptr();
  f.dx = needs & 1 ? dx.mutable_data_ptr() : nullptr;
  IMAGEN_FAST_KERNEL(channel_rms_norm_act_backward, f.dtype)(f);
  return {dx, dweight, dscale, dshift};
}

}  // namespace
}  // namespace channel_rms_norm_act
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("channel_rms_norm_act_cpu", TORCH_BOX(&imagen_fast::channel_rms_norm_act::forward));
  library.impl("channel_rms_norm_act_backward_cpu", TORCH_BOX(&imagen_fast::channel_rms_norm_act::backward));
}
