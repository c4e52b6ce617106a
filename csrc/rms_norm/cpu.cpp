// Registers the CPU kernels of rms_norm.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../common/cpu_capability.h"
#include "arguments.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void rms_norm_forward(const rms_norm::Forward&))
IMAGEN_FAST_DECLARE_KERNEL(void rms_norm_backward(const rms_norm::Backward&))

namespace rms_norm {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual,
                                           double eps) {
  Forward f{problem(x, weight), eps, rows_of(kOp, "x", x), {}, {}, {}, nullptr};
  Tensor y = uninitialized_rows_like(x, f.width);
  Tensor sum = residual ? uninitialized_rows_like(x, f.width) : uninitialized_vector(0, dtype_code(x));
  Tensor rstd = uninitialized_matrix(f.outer, f.inner, statistics_dtype(f));
  if (residual) {
    f.residual = rows_like(kOp, "residual", *residual, x, f.width);
    f.sum = mutable_rows(sum);
  }
  f.y = mutable_rows(y);
  f.rstd = rstd.mutable_data_ptr();
  if (y.numel() > 0) IMAGEN_FAST_KERNEL(rms_norm_forward, f.dtype)(f);
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x,
                                    const Tensor& rstd, const Tensor& weight, int64_t needs) {
  Backward b{problem(x, weight), {}, {}, rows_of(kOp, "x", x), rstd.const_data_ptr(), {}, {}};
  b.dy = rows_like(kOp, "dy", dy, x, b.width);
  if (dsum) b.dsum = rows_like(kOp, "dsum", *dsum, x, b.width);
  check_rstd(b, rstd);
  Tensor dx = needs & 1 ? uninitialized_rows_like(x, b.width) : uninitialized_vector(0, dtype_code(x));
  Tensor dweight = uninitialized_vector(needs & 2 ? b.width : 0, dtype_code(weight));
  if (needs & 1) b.dx = mutable_rows(dx);
  if (needs & 2) b.dweight = {dweight.mutable_data_ptr(), b.weight.dtype};
  if (x.numel() > 0) {
    IMAGEN_FAST_KERNEL(rms_norm_backward, b.dtype)(b);
  } else {
    torch::stable::fill_(dweight, 0);
  }
  return {dx, dweight};
}

}  // namespace
}  // namespace rms_norm
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("rms_norm_cpu", TORCH_BOX(&imagen_fast::rms_norm::forward));
  library.impl("rms_norm_backward_cpu", TORCH_BOX(&imagen_fast::rms_norm::backward));
}
