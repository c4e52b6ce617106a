// The forward pass of rms_norm: s = x + residual, y = s * rstd * weight, rstd = 1 / sqrt(mean(s^2) + eps).
#pragma once

#include "kernel_row.cuh"

namespace imagen_fast::rms_norm::device {

struct Forward : Problem {
  float eps;
  RowViews x;
  RowViews residual;    // or no data
  MutableRowViews sum;  // if there is a residual
  MutableRowViews y;
  float* rstd;  // by rows
};

// x + residual, rounded to T, as a residual stream is
template <typename T, int V>
__device__ __forceinline__ Vector<T, V> sum_of(const Vector<T, V>& x, const Vector<T, V>& residual) {
  Vector<T, V> sum;
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
  return sum;
}

template <typename T, int V>
__device__ __forceinline__ float add_squares(const Vector<T, V>& s, float squares) {
#pragma unroll
  for (int i = 0; i < V; ++i) squares = fmaf(to_float(s[i]), to_float(s[i]), squares);
  return squares;
}

// rstd of a row, which its first thread writes down
__device__ __forceinline__ float inverse_deviation(const Forward& f, int64_t row, float squares) {
  const float rstd = 1.0f / sqrtf(row_sum(squares) / static_cast<float>(f.width) + f.eps);
  if (threadIdx.x == 0) f.rstd[row] = rstd;
  return rstd;
}

template <typename T, int V>
__device__ __forceinline__ void write_y(const Forward& f, T* y, int column, const Vector<T, V>& s, float rstd) {
  float weight[V];
  read_weight(f.weight, column, weight);
  Vector<T, V> result;
#pragma unroll
  for (int i = 0; i < V; ++i) result[i] = from_float<T>(to_float(s[i]) * rstd * weight[i]);
  store<V>(y + column, result);
}

// Grid: all rows, those abreast in a block. A row is read once.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_resident(Forward f) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= f.geometry.rows) return;  // a whole warp
  constexpr int kVectors = kHeldForward<V>;
  Vector<T, V> s[kVectors];
  load_row(row_at<T>(f.geometry, f.x, row), f.width, s);
  if (f.residual.data) {
    Vector<T, V> residual[kVectors];
    load_row(row_at<T>(f.geometry, f.residual, row), f.width, residual);
    T* sum = row_at<T>(f.geometry, f.sum, row);
    for_held<V, kVectors>(f.width, [&](int i, int column) {
      s[i] = sum_of(s[i], residual[i]);
      store<V>(sum + column, s[i]);
    });
  }
  float squares = 0.0f;
  for_held<V, kVectors>(f.width, [&](int i, int) { squares = add_squares(s[i], squares); });
  const float rstd = inverse_deviation(f, row, squares);
  T* y = row_at<T>(f.geometry, f.y, row);
  for_held<V, kVectors>(f.width, [&](int i, int column) { write_y(f, y, column, s[i], rstd); });
}

// Grid: a block per row.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_walk(Forward f) {
  const int64_t row = blockIdx.x;
  const int first = column_of<V>(0);
  const int step = static_cast<int>(blockDim.x) * V;
  const T* s = row_at<T>(f.geometry, f.x, row);
  float squares = 0.0f;
  if (f.residual.data) {
    const T* residual = row_at<T>(f.geometry, f.residual, row);
    T* sum = row_at<T>(f.geometry, f.sum, row);
    for (int column = first; column < f.width; column += step) {
      const Vector<T, V> added = sum_of(load<V>(s + column), load<V>(residual + column));
      store<V>(sum + column, added);
      squares = add_squares(added, squares);
    }
    s = sum;  // of which each thread will read what it wrote itself
  } else {
    for (int column = first; column < f.width; column += step) squares = add_squares(load<V>(s + column), squares);
  }
  const float rstd = inverse_deviation(f, row, squares);
  T* y = row_at<T>(f.geometry, f.y, row);
  for (int column = first; column < f.width; column += step) write_y(f, y, column, load<V>(s + column), rstd);
}

}  // namespace imagen_fast::rms_norm::device
