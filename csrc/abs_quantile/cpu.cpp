// Registers the CPU kernel of abs_quantile. The schema, and the checks that tell users what to pass instead, are in
// imagen_fast/ops/abs_quantile.py; the checks here keep direct calls of the operator from reading out of bounds.
#include <torch/csrc/stable/library.h>

#include "../common/cpu_capability.h"
#include "../common/tensor.h"
#include "problem.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void abs_quantile_kernel(const abs_quantile::Problem&))

namespace abs_quantile {
namespace {

// Whether the elements of a sample fill their memory, in whatever order
bool samples_are_dense(const Tensor& x) {
  int64_t filled = 1;
  int64_t left = 1;
  for (int64_t i = 1; i < x.dim(); ++i) left *= x.size(i);
  while (filled < left) {
    int64_t next = 0;
    for (int64_t i = 1; i < x.dim() && !next; ++i) {
      if (x.size(i) > 1 && x.stride(i) == filled) next = x.size(i);
    }
    if (!next) return false;
    filled *= next;
  }
  return true;
}

Tensor quantile(const Tensor& x, double q) {
  STD_TORCH_CHECK(x.dim() >= 1, "abs_quantile: x must have at least 1 dimension");
  STD_TORCH_CHECK(q >= 0 && q <= 1, "abs_quantile: q must be in [0, 1], got ", q);
  Problem p{};
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.size = 1;
  for (int64_t i = 1; i < x.dim(); ++i) p.size *= x.size(i);
  const bool wide = p.dtype == DType::kDouble;
  const int64_t one[] = {1};
  Tensor result =
      uninitialized({&p.batch, 1}, {one, 1}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  if (p.batch == 0) return result;
  STD_TORCH_CHECK(p.size > 0, "abs_quantile: the samples of x are empty");
  STD_TORCH_CHECK(samples_are_dense(x), "abs_quantile: the samples of x must be dense");
  p.stride_b = x.stride(0);
  p.q = q;
  p.x = x.const_data_ptr();
  p.result = result.mutable_data_ptr();
  IMAGEN_FAST_KERNEL(abs_quantile_kernel)(p);
  return result;
}

}  // namespace
}  // namespace abs_quantile
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("abs_quantile_cpu", TORCH_BOX(&imagen_fast::abs_quantile::quantile));
}
