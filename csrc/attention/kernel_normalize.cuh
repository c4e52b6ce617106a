// Rows that are l2-normalised before they are multiplied, y = x / max(|x|, 1e-12) * scale, and sums of gradients in
// order.
#pragma once

#include "kernel_problem.cuh"
#include "kernel_rows.cuh"

namespace imagen_fast::attention::device {

constexpr int kRowWarps = 4;     // of a block; each takes a row at a time
constexpr int kFinishRows = 64;  // of a block of `finish_normalized`
constexpr int kWidest = 256;
constexpr int kLaneElements = kWidest / kWarpSize;

struct Normalize {
  Rows x;
  void* y;  // (B, H, L, D), contiguous, of x's dtype
  Parameter scale;
  int heads;
  int length;
  int width;
  int64_t rows;  // B H L
};

template <typename T>
__global__ void __launch_bounds__(kRowWarps* kWarpSize) normalize(const __grid_constant__ Normalize f) {
  float scale[kLaneElements], x[kLaneElements];
  load_scale(f.scale, f.width, scale);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + warp_rank();
  if (row >= f.rows) return;
  const int64_t head = row / f.length;
  const int b = static_cast<int>(head / f.heads), h = static_cast<int>(head % f.heads);
  load_row(f.x.at<T>(b, h, static_cast<int>(row % f.length)), f.width, x);
  const float inverse = inverse_norm(x);
  T* y = static_cast<T*>(f.y) + row * f.width;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const int d = kWarpSize * i + lane();
    if (d < f.width) y[d] = from_float<T>(x[i] * inverse * scale[i]);
  }
}

// From the gradient of y, dy (B, H, L, D) in float and contiguous, those of x and, as sums over the rows of a block,
// of scale.
struct FinishNormalized {
  Rows x;
  const float* dy;
  Output dx;      // not asked for if data is null
  float* dscale;  // (blocks, D)
  Parameter scale;
  int heads;
  int length;
  int width;
  int64_t rows;  // B H L
};

// Grid: a block for kFinishRows rows.
template <typename T>
__global__ void __launch_bounds__(kRowWarps* kWarpSize) finish_normalized(const __grid_constant__ FinishNormalized f) {
  SHARED(sums, float[kRowWarps][kWidest]);
  float scale[kLaneElements], dscale[kLaneElements];
  load_scale(f.scale, f.width, scale);
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) dscale[i] = 0.0f;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinishRows;
  for (int64_t row = first + warp_rank(); row < first + kFinishRows && row < f.rows; row += kRowWarps) {
    const int64_t head = row / f.length;
    const int b = static_cast<int>(head / f.heads), h = static_cast<int>(head % f.heads);
    const int l = static_cast<int>(row % f.length);
    float x[kLaneElements], dy[kLaneElements];
    load_row(f.x.at<T>(b, h, l), f.width, x);
    load_row(f.dy + row * f.width, f.width, dy);
    const float inverse = inverse_norm(x);
    float along = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      x[i] *= inverse;
      dscale[i] = fmaf(dy[i], x[i], dscale[i]);
      dy[i] *= scale[i];
      along = fmaf(dy[i], x[i], along);
    }
    along = warp_sum(along);
    if (!(inverse < 1e12f)) along = 0.0f;  // the divisor is held at its smallest
    if (!f.dx.data) continue;
    T* dx = static_cast<T*>(f.dx.data) + b * f.dx.stride_b + h * f.dx.stride_h + l * f.dx.stride_l;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const int d = kWarpSize * i + lane();
      if (d < f.width) dx[d] = from_float<T>(inverse * (dy[i] - x[i] * along));
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) sums[warp_rank()][kWarpSize * i + lane()] = dscale[i];
  __syncthreads();
  for (int d = thread_rank(); d < f.width; d += kRowWarps * kWarpSize) {
    float sum = sums[0][d];
    for (int warp = 1; warp < kRowWarps; ++warp) sum += sums[warp][d];
    f.dscale[static_cast<int64_t>(blockIdx.x) * f.width + d] = sum;
  }
}

// to[c'] = the sum of from (rows, columns) over its rows, where c' is c or, if columns stand for (outer, columns /
// outer), their transpose.
struct SumRows {
  const float* from;
  int64_t rows;
  int columns;
  int outer;
  ParameterGradient to;
};

constexpr int kSumWarps = 8;

static __global__ void __launch_bounds__(kSumWarps* kWarpSize) sum_rows(const __grid_constant__ SumRows f) {
  SHARED(sums, float[kSumWarps][kWarpSize]);
  const int column = static_cast<int>(blockIdx.x) * kWarpSize + lane();
  float sum = 0.0f;
  if (column < f.columns) {
    for (int64_t row = warp_rank(); row < f.rows; row += kSumWarps) sum += f.from[row * f.columns + column];
  }
  sums[warp_rank()][lane()] = sum;
  __syncthreads();
  if (warp_rank() != 0 || column >= f.columns) return;
  for (int warp = 1; warp < kSumWarps; ++warp) sum += sums[warp][lane()];
  const int inner = f.columns / f.outer;
  const int to = column % inner * f.outer + column / inner;
  switch (f.to.dtype) {
    case DType::kHalf: static_cast<__half*>(f.to.data)[to] = from_float<__half>(sum); return;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(f.to.data)[to] = from_float<__nv_bfloat16>(sum); return;
    default: static_cast<float*>(f.to.data)[to] = sum; return;
  }
}

}  // namespace imagen_fast::attention::device
