// What the operators of the CPU and of CUDA make of their arguments. The schemas, and the checks that tell users what
// to pass instead, are in imagen_fast/ops/rms_norm.py; the checks here keep direct calls of the operators from reading
// out of bounds.
#pragma once

#include <optional>

#include "../common/tensor_rows.h"
#include "problem.h"

namespace imagen_fast::rms_norm {

constexpr const char* kOp = "rms_norm";

inline Problem problem(const Tensor& x, const Tensor& weight) {
  Problem p{};
  rows_of(kOp, "x", x);
  p.dtype = dtype_of(x);
  p.outer = x.size(0);
  p.inner = x.size(1);
  p.width = x.size(2);
  STD_TORCH_CHECK(p.width > 0, kOp, ": x must have a last dimension of at least 1");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == p.width, kOp, ": weight must have shape (C,), C = ", p.width);
  p.weight = {weight.const_data_ptr(), dtype_of(weight), 0, weight.stride(0)};
  STD_TORCH_CHECK((p.weight.dtype == DType::kDouble) == (p.dtype == DType::kDouble), kOp,
                  ": weight must be float64 if and only if x is");
  return p;
}

inline int32_t statistics_dtype(const Problem& p) {
  return p.dtype == DType::kDouble ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline void check_rstd(const Problem& p, const Tensor& rstd) {
  STD_TORCH_CHECK(rstd.numel() == p.outer * p.inner && rstd.is_contiguous() && dtype_code(rstd) == statistics_dtype(p),
                  kOp, ": rstd must be as the forward pass returned it");
}

}  // namespace imagen_fast::rms_norm
