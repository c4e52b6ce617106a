// What the operators of the CPU and of CUDA make of their arguments. The schemas, and the checks that tell users what
// to pass instead, are in imagen_fast/ops/channel_rms_norm_act.py; the checks here keep direct calls of the operators
// from reading out of bounds.
#pragma once

#include "../common/norm_tensors.h"
#include "problem.h"

namespace imagen_fast::channel_rms_norm_act {

constexpr const char* kOp = "channel_rms_norm_act";

inline NormProblem problem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                           const std::optional<Tensor>& shift, int64_t activation) {
  NormProblem p = norm_problem(kOp, x, activation);
  STD_TORCH_CHECK(p.channels > 0, kOp, ": x must have at least one channel");
  p.parameters = {per_channel(kOp, p, "weight", weight),
                  {},
                  per_sample(kOp, p, "scale", scale),
                  per_sample(kOp, p, "shift", shift)};
  return p;
}

}  // namespace imagen_fast::channel_rms_norm_act
