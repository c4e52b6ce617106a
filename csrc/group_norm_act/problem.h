// y = act(z * (1 + scale) + shift), z = xhat * weight + bias, xhat = (x - mean) * rstd, with mean and rstd over each
// (sample, group). What the registration hands to the kernel of the chosen instruction set.
#pragma once

#include <cstdint>

#include "../common/norm_problem.h"

namespace imagen_fast::group_norm_act {

struct Problem : NormProblem {
  int64_t groups;
};

// Statistics and sums are fp32, or fp64 where x is.
struct Forward : Problem {
  double eps;
  const void* x;
  const void* skip;       // the channels that follow those of x, as it lies in memory; or null
  int64_t skip_channels;  // of `channels`; 0 if null
  void* y;
  void* mean;  // (batch, groups)
  void* rstd;  // (batch, groups)
};

struct Backward : Problem {
  const void* dy;
  const void* x;
  const void* mean;
  const void* rstd;
  void* dx;  // null if it is not asked for
  ParameterGradients gradients;
};

}  // namespace imagen_fast::group_norm_act
