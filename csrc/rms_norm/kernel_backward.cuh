// The backward pass of rms_norm. With xhat = s * rstd and g = dy * weight:
//
//     dx = rstd * (g - xhat * mean(g * xhat)) + dsum        dweight = sum of dy * xhat over all rows
//
// Blocks leave their parts of dweight to `join`, which adds them in order: there are no float atomics.
#pragma once

#include "kernel_row.cuh"

namespace imagen_fast::rms_norm::device {

struct Backward : Problem {
  RowViews dy;
  RowViews dsum;  // or no data
  RowViews s;
  const float* rstd;   // by rows
  MutableRowViews dx;  // no data if it is not asked for
  float* partial;      // (row_blocks, width): parts of dweight; null if it is not asked for
  int64_t row_blocks;
  int64_t rows_of_block;
};

// sum += dy * xhat
template <typename T, int V>
__device__ __forceinline__ void add_products(const Vector<T, V>& dy, const Vector<T, V>& s, float rstd, float* sum) {
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = fmaf(to_float(dy[i]), to_float(s[i]) * rstd, sum[i]);
}

// sum + g * xhat over a vector
template <typename T, int V>
__device__ __forceinline__ float add_to_mean(const Backward& f, int column, const Vector<T, V>& dy,
                                             const Vector<T, V>& s, float rstd, float sum) {
  float weight[V];
  read_weight(f.weight, column, weight);
#pragma unroll
  for (int i = 0; i < V; ++i) sum = fmaf(to_float(dy[i]) * weight[i], to_float(s[i]) * rstd, sum);
  return sum;
}

template <typename T, int V>
__device__ __forceinline__ void write_dx(const Backward& f, int64_t row, int column, const Vector<T, V>& dy,
                                         const Vector<T, V>& s, float rstd, float mean) {
  float weight[V], added[V];
  read_weight(f.weight, column, weight);
  if (f.dsum.data) {
    load_as_floats<V>(row_at<T>(f.geometry, f.dsum, row) + column, added);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) added[i] = 0.0f;
  }
  Vector<T, V> dx;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float inner = fmaf(to_float(s[i]) * -rstd, mean, to_float(dy[i]) * weight[i]);
    dx[i] = from_float<T>(fmaf(rstd, inner, added[i]));
  }
  store<V>(row_at<T>(f.geometry, f.dx, row) + column, dx);
}

template <int V>
__device__ __forceinline__ void write_sums(const float* sums, float* to) {
  if constexpr (V == 1) {
    *to = *sums;
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 4) store<4>(to + i, Vector<float, 4>{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]});
  }
}

// Grid: a block per rows_of_block rows. Each row is read once. Dynamic shared memory: width floats if several rows are
// abreast.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_resident(Backward f) {
  constexpr int kVectors = kHeldBackward<V>;
  float sums[kVectors * V];
#pragma unroll
  for (int i = 0; i < kVectors * V; ++i) sums[i] = 0.0f;

  const int64_t first = static_cast<int64_t>(blockIdx.x) * f.rows_of_block;
  const int64_t last = min(first + f.rows_of_block, f.geometry.rows);
  for (int64_t row = first + threadIdx.y; row < last; row += blockDim.y) {
    Vector<T, V> s[kVectors], dy[kVectors];
    load_row(row_at<T>(f.geometry, f.s, row), f.width, s);
    load_row(row_at<T>(f.geometry, f.dy, row), f.width, dy);
    const float rstd = f.rstd[row];
    if (f.partial) {
      for_held<V, kVectors>(f.width, [&](int i, int) { add_products(dy[i], s[i], rstd, sums + i * V); });
    }
    if (f.dx.data) {
      float mean = 0.0f;
      for_held<V, kVectors>(f.width,
                            [&](int i, int column) { mean = add_to_mean(f, column, dy[i], s[i], rstd, mean); });
      mean = row_sum(mean) / static_cast<float>(f.width);
      for_held<V, kVectors>(f.width, [&](int i, int column) { write_dx(f, row, column, dy[i], s[i], rstd, mean); });
    }
  }

  if (!f.partial) return;
  float* const partial = f.partial + static_cast<int64_t>(blockIdx.x) * f.width;
  if (blockDim.y == 1) {
    for_held<V, kVectors>(f.width, [&](int i, int column) { write_sums<V>(sums + i * V, partial + column); });
    return;
  }
  float* const total = dynamic_shared<float>();
  for (unsigned warp = 0; warp < blockDim.y; ++warp) {  // in order
    if (threadIdx.y == warp) {
      for_held<V, kVectors>(f.width, [&](int i, int column) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          total[column + k] = warp == 0 ? sums[i * V + k] : total[column + k] + sums[i * V + k];
        }
      });
    }
    __syncthreads();
  }
  for (int column = thread_rank(); column < f.width; column += block_threads()) partial[column] = total[column];
}

// dx. Grid: a block per row.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_walk(Backward f) {
  const int64_t row = blockIdx.x;
  const int first = column_of<V>(0);
  const int step = static_cast<int>(blockDim.x) * V;
  const T* s = row_at<T>(f.geometry, f.s, row);
  const T* dy = row_at<T>(f.geometry, f.dy, row);
  const float rstd = f.rstd[row];
  float mean = 0.0f;
  for (int column = first; column < f.width; column += step) {
    mean = add_to_mean(f, column, load<V>(dy + column), load<V>(s + column), rstd, mean);
  }
  mean = row_sum(mean) / static_cast<float>(f.width);
  for (int column = first; column < f.width; column += step) {
    write_dx(f, row, column, load<V>(dy + column), load<V>(s + column), rstd, mean);
  }
}

// Parts of dweight. Grid: blocks of columns, a vector for each thread, by blocks of rows.
template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads) weight_walk(Backward f) {
  const int64_t block = blockIdx.x % f.row_blocks;
  const int column = static_cast<int>(blockIdx.x / f.row_blocks * blockDim.x + threadIdx.x) * V;
  if (column >= f.width) return;
  float sums[V];
#pragma unroll
  for (int i = 0; i < V; ++i) sums[i] = 0.0f;
  const int64_t first = block * f.rows_of_block;
  const int64_t last = min(first + f.rows_of_block, f.geometry.rows);
  for (int64_t row = first; row < last; ++row) {
    const Vector<T, V> s = load<V>(row_at<T>(f.geometry, f.s, row) + column);
    const Vector<T, V> dy = load<V>(row_at<T>(f.geometry, f.dy, row) + column);
    add_products(dy, s, f.rstd[row], sums);
  }
  write_sums<V>(sums, f.partial + block * f.width + column);
}

constexpr int kJoinRows = 16;

// dweight from its parts. Block: 32 columns by kJoinRows parts; grid: columns / 32, rounded up.
static __global__ void __launch_bounds__(kWarpSize* kJoinRows)
    join(const float* partial, int64_t parts, int width, ParameterGradient dweight) {
  SHARED(rows, float[kJoinRows][kWarpSize]);
  const int column = static_cast<int>(blockIdx.x * kWarpSize + threadIdx.x);
  float sum = 0.0f;
  if (column < width) {
    for (int64_t part = threadIdx.y; part < parts; part += kJoinRows) sum += partial[part * width + column];
  }
  rows[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int row = 1; row < kJoinRows; ++row) sum += rows[row][threadIdx.x];
  store_float(dweight.data, dweight.dtype, column, sum);
}

}  // namespace imagen_fast::rms_norm::device
