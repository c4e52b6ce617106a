// What the operators of the CPU and of CUDA make of their arguments. The schema, and the checks that tell users what to
// pass instead, are in imagen_fast/ops/abs_quantile.py; the checks here keep direct calls of the operators from reading
// out of bounds.
#pragma once

#include "../common/tensor.h"
#include "problem.h"

namespace imagen_fast::abs_quantile {

// Whether the elements of a sample fill their memory, in whatever order
inline bool samples_are_dense(const Tensor& x) {
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

// Everything but the result
inline Problem problem(const Tensor& x, double q) {
  STD_TORCH_CHECK(x.dim() >= 1, "abs_quantile: x must have at least 1 dimension");
  STD_TORCH_CHECK(q >= 0 && q <= 1, "abs_quantile: q must be in [0, 1], got ", q);
  Problem p{};
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.size = 1;
  for (int64_t i = 1; i < x.dim(); ++i) p.size *= x.size(i);
  p.stride_b = x.stride(0);
  p.q = q;
  if (p.batch == 0) return p;
  STD_TORCH_CHECK(p.size > 0, "abs_quantile: the samples of x are empty");
  STD_TORCH_CHECK(samples_are_dense(x), "abs_quantile: the samples of x must be dense");
  p.x = x.const_data_ptr();
  return p;
}

}  // namespace imagen_fast::abs_quantile
