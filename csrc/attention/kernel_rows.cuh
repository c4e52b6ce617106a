// Rows of which a warp has one at a time, lane l the elements l, l + 32, ...: their lengths and their scales.
#pragma once

#include "kernel_problem.cuh"

namespace imagen_fast::attention::device {

template <typename T, int N>
__device__ __forceinline__ void load_row(const T* x, int width, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int d = kWarpSize * i + lane();
    values[i] = d < width ? to_float(x[d]) : 0.0f;
  }
}

template <int N>
__device__ __forceinline__ void load_scale(const Parameter& scale, int width, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int d = kWarpSize * i + lane();
    values[i] = d < width ? load_as_float(scale.data, scale.dtype, d) : 0.0f;
  }
}

__device__ __forceinline__ float inverse_of_length(float length) { return 1.0f / (length < 1e-12f ? 1e-12f : length); }

template <int N>
__device__ __forceinline__ float inverse_norm(const float (&x)[N]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum = fmaf(x[i], x[i], sum);
  return inverse_of_length(sqrtf(warp_sum(sum)));
}

}  // namespace imagen_fast::attention::device
