// y = act(z * (1 + scale) + shift), z = xhat * weight + bias, xhat = (x - mean) * rstd, with mean and rstd over each
// (sample, group). What the registration hands to the kernel of the chosen instruction set.
#pragma once

#include <cstdint>

#include "../common/activation_codes.h"
#include "../common/number_formats.h"

namespace imagen_fast::group_norm_act {

// A per-channel parameter (C,) or (B, C) in any strides; absent if data is null.
struct Parameter {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t stride_b = 0;
  int64_t stride_c = 0;
};

struct Problem {
  DType dtype;         // of x, y and their gradients
  bool channels_last;  // x is [batch][positions][channels] in memory, else [batch][channels][positions]
  int64_t batch;
  int64_t channels;
  int64_t positions;
  int64_t groups;
  Activation activation;
  Parameter weight, bias, scale, shift;
};

// Statistics and sums are fp32, or fp64 where x is.
struct Forward : Problem {
  double eps;
  const void* x;
  void* y;
  void* mean;  // (batch, groups)
  void* rstd;  // (batch, groups)
};

// With dt = dL/dy * act'(t), t the activation's argument:
struct Backward : Problem {
  const void* dy;
  const void* x;
  const void* mean;
  const void* rstd;
  void* dx;
  void* sum_dt;       // (batch, channels): sum over positions of dt
  void* sum_dt_xhat;  // (batch, channels): sum over positions of dt * xhat
};

}  // namespace imagen_fast::group_norm_act
