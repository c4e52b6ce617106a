// The quantile of |x| over each sample. What the registration hands to the kernel of the chosen instruction set.
#pragma once

#include "../common/number_formats.h"

namespace imagen_fast::abs_quantile {

struct Problem {
  DType dtype;
  int64_t batch;
  int64_t size;      // of a sample, which is dense, in any order
  int64_t stride_b;  // in elements
  double q;
  const void* x;
  void* result;  // (batch,), fp32, or fp64 where x is
};

}  // namespace imagen_fast::abs_quantile
