// Registers the CPU kernels of rms_norm. The schemas, and the checks that tell users what to pass instead, are in
// imagen_fast/ops/rms_norm.py; the checks here keep direct calls of the operators from reading out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../common/cpu_capability.h"
#include "../common/tensor_rows.h"
#include "problem.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void rms_norm_forward(const rms_norm::Forward&))
IMAGEN_FAST_DECLARE_KERNEL(void rms_norm_backward(const rms_norm::Backward&))

namespace rms_norm {
namespace {

constexpr const char* kName = "rms_norm";

Problem problem(const Tensor& x, const Tensor& weight) {
  Problem p{};
  rows_of(kName, "x", x);
  p.dtype = dtype_of(x);
  p.outer = x.size(0);
  p.inner = x.size(1);
  p.width = x.size(2);
  STD_TORCH_CHECK(p.width > 0, "rms_norm: x must have a last dimension of at least 1");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == p.width,
                  "rms_norm: weight must have shape (C,), C = ", p.width);
  p.weight = {weight.const_data_ptr(), dtype_of(weight), 0, weight.stride(0)};
  STD_TORCH_CHECK((p.weight.dtype == DType::kDouble) == (p.dtype == DType::kDouble),
                  "rms_norm: weight must be float64 if and only if x is");
  return p;
}

int32_t statistics_dtype(const Problem& p) {
  return p.dtype == DType::kDouble ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual,
                                           double eps) {
  Forward f{problem(x, weight), eps, rows_of(kName, "x", x), {}, {}, {}, nullptr};
  Tensor y = uninitialized_rows_like(x, f.width);
  Tensor sum = residual ? uninitialized_rows_like(x, f.width) : uninitialized_vector(0, dtype_code(x));
  Tensor rstd = uninitialized_matrix(f.outer, f.inner, statistics_dtype(f));
  if (residual) {
    f.residual = rows_like(kName, "residual", *residual, x, f.width);
    f.sum = mutable_rows(sum);
  }
  f.y = mutable_rows(y);
  f.rstd = rstd.mutable_data_ptr();
  if (y.numel() > 0) IMAGEN_FAST_KERNEL(rms_norm_forward)(f);
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x,
                                    const Tensor& rstd, const Tensor& weight, int64_t needs) {
  Backward b{problem(x, weight), {}, {}, rows_of(kName, "x", x), rstd.const_data_ptr(), {}, {}};
  b.dy = rows_like(kName, "dy", dy, x, b.width);
  if (dsum) b.dsum = rows_like(kName, "dsum", *dsum, x, b.width);
  STD_TORCH_CHECK(rstd.numel() == b.outer * b.inner && rstd.is_contiguous() && dtype_code(rstd) == statistics_dtype(b),
                  "rms_norm: rstd must be as the forward pass returned it");
  Tensor dx = needs & 1 ? uninitialized_rows_like(x, b.width) : uninitialized_vector(0, dtype_code(x));
  Tensor dweight = uninitialized_vector(needs & 2 ? b.width : 0, dtype_code(weight));
  if (needs & 1) b.dx = mutable_rows(dx);
  if (needs & 2) b.dweight = {dweight.mutable_data_ptr(), b.weight.dtype};
  if (x.numel() > 0) {
    IMAGEN_FAST_KERNEL(rms_norm_backward)(b);
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
