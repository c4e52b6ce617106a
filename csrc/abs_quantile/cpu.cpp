// Registers the CPU kernel of abs_quantile.
#include <torch/csrc/stable/library.h>

#include "../common/cpu_capability.h"
#include "arguments.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void abs_quantile_kernel(const abs_quantile::Problem&))

namespace abs_quantile {
namespace {

Tensor quantile(const Tensor& x, double q) {
  Problem p = problem(x, q);
  const bool wide = p.dtype == DType::kDouble;
  const int64_t one[] = {1};
  Tensor result =
      uninitialized({&p.batch, 1}, {one, 1}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  if (p.batch == 0) return result;
  p.result = result.mutable_data_ptr();
  IMAGEN_FAST_KERNEL(abs_quantile_kernel, p.dtype)(p);
  return result;
}

}  // namespace
}  // namespace abs_quantile
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("abs_quantile_cpu", TORCH_BOX(&imagen_fast::abs_quantile::quantile));
}
