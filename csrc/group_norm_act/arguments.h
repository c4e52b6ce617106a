// What the operators of the CPU and of CUDA make of their arguments. The schemas, and the checks that tell users what
// to pass instead, are in imagen_fast/ops/group_norm_act.py; the checks here keep direct calls of the operators from
// reading out of bounds.
#pragma once

#include "../common/norm_tensors.h"
#include "problem.h"

namespace imagen_fast::group_norm_act {

constexpr const char* kOp = "group_norm_act";

// `more_channels` follow those of x.
inline Problem problem(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& shift, int64_t activation, int64_t more_channels = 0) {
  Problem p{norm_problem(kOp, x, activation), num_groups};
  p.channels += more_channels;
  p.parameters = {per_channel(kOp, p, "weight", weight), per_channel(kOp, p, "bias", bias),
                  per_sample(kOp, p, "scale", scale), per_sample(kOp, p, "shift", shift)};
  STD_TORCH_CHECK(num_groups > 0 && p.channels % num_groups == 0, kOp, ": ", num_groups, " groups do not divide ",
                  p.channels, " channels");
  return p;
}

}  // namespace imagen_fast::group_norm_act
