// xhat = x * rstd, rstd = sqrt(C) / max(|x|, 1e-12), |x| the 2-norm over the channels of one position. What the
// registration hands to the kernel of the chosen instruction set.
#pragma once

#include "../common/norm_problem.h"

namespace imagen_fast::channel_rms_norm_act {

// rstd is (batch, positions), fp32, or fp64 where x is.
struct Forward : NormProblem {
  const void* x;
  void* y;
  void* rstd;
};

struct Backward : NormProblem {
  const void* dy;
  const void* x;
  const void* rstd;
  void* dx;  // null if it is not asked for
  ParameterGradients gradients;
};

}  // namespace imagen_fast::channel_rms_norm_act
