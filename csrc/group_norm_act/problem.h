// y = act(z * (1 + scale) + shift), z = xhat * weight + bias, xhat = (x - mean) * rstd, with mean and rstd over each
// (sample, group). What the registration hands to the kernel of the chosen instruction set.
#pragma once

#include <cstdint>

#include "../common/activation_codes.h"
#include "../common/number_formats.h"
#include "../common/parameters.h"

namespace imagen_fast::group_norm_act {

struct Problem {
  DType dtype;         // of x, y and their gradients
  bool channels_last;  // x is [batch][positions][channels] in memory, else [batch][channels][positions]
  int64_t batch;
  int64_t channels;
  int64_t positions;
  int64_t groups;
  Activation activation;
  Parameters parameters;
};

// Statistics and sums are fp32, or fp64 where x is.
struct Forward : Problem {
  double eps;
  const void* x;
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
