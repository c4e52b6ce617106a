// The parameters of a norm in kernels, t = xhat * weight * (1 + scale) + bias * (1 + scale) + shift, and their
// gradients, from the sums over positions of every (sample, channel), S = sum dt and T = sum dt * xhat.
#pragma once

#include "cuda.cuh"
#include "parameters.h"

namespace imagen_fast {

// Element (b, c) of a parameter, or `absent`
__device__ __forceinline__ float read_parameter(const Parameter& parameter, int64_t b, int64_t c, float absent) {
  if (!parameter.data) return absent;
  return load_as_float(parameter.data, parameter.dtype, b * parameter.stride_b + c * parameter.stride_c);
}

__device__ __forceinline__ void write_gradient(const ParameterGradient& gradient, int64_t i, float value) {
  store_float(gradient.data, gradient.dtype, i, value);
}

// t = xhat * multiplier + offset
struct ChannelAffine {
  float multiplier;
  float offset;
};

__device__ __forceinline__ ChannelAffine channel_affine(const Parameters& p, int64_t b, int64_t c) {
  const float scale = 1.0f + read_parameter(p.scale, b, c, 0.0f);
  const float weight = read_parameter(p.weight, 0, c, 1.0f);
  const float bias = read_parameter(p.bias, 0, c, 0.0f);
  return {weight * scale, fmaf(bias, scale, read_parameter(p.shift, b, c, 0.0f))};
}

// What `parameter_gradients` takes
struct ParameterSums {
  const float2* sums;  // (batch, channels): S and T
  int64_t batch;
  int channels;
  Parameters parameters;
  ParameterGradients gradients;
};

constexpr int kGradientRows = 8;  // samples that a block takes at a time

// The gradients of the parameters. Block: 32 channels by kGradientRows samples; grid: channels / 32, rounded up.
static __global__ void __launch_bounds__(kWarpSize* kGradientRows) parameter_gradients(ParameterSums f) {
  SHARED(rows, float2[kGradientRows][kWarpSize]);
  const int c = static_cast<int>(blockIdx.x) * kWarpSize + static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(threadIdx.y);
  float2 total{0.0f, 0.0f};  // of dweight and dbias
  if (c < f.channels) {
    const float weight = read_parameter(f.parameters.weight, 0, c, 1.0f);
    const float bias = read_parameter(f.parameters.bias, 0, c, 0.0f);
    for (int64_t b = row; b < f.batch; b += kGradientRows) {
      const int64_t at = b * f.channels + c;
      const float2 sum = f.sums[at];
      const float scale = 1.0f + read_parameter(f.parameters.scale, b, c, 0.0f);
      total = {fmaf(scale, sum.y, total.x), fmaf(scale, sum.x, total.y)};
      if (f.gradients.scale.data) {
        // The second term only where there is a bias: 0 times an infinite sum would be NaN.
        const float dscale = weight * sum.y;
        write_gradient(f.gradients.scale, at, f.parameters.bias.data ? fmaf(bias, sum.x, dscale) : dscale);
      }
      if (f.gradients.shift.data) write_gradient(f.gradients.shift, at, sum.x);
    }
  }
  rows[row][threadIdx.x] = total;
  __syncthreads();
  if (row != 0 || c >= f.channels) return;
  for (int r = 1; r < kGradientRows; ++r) {
    total = {total.x + rows[r][threadIdx.x].x, total.y + rows[r][threadIdx.x].y};
  }
  if (f.gradients.weight.data) write_gradient(f.gradients.weight, c, total.x);
  if (f.gradients.bias.data) write_gradient(f.gradients.bias, c, total.y);
}

}  // namespace imagen_fast
