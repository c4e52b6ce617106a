// What the kernels of rms_norm share: a row's columns, the weight, sums over a row.
//
// Block: (threads of a row, rows abreast). Where several rows are abreast a row has one warp, else the whole block.
#pragma once

#include "../common/cuda_rows.cuh"
#include "../common/parameters.h"
#include "plan.h"

namespace imagen_fast::rms_norm::device {

struct Problem {
  RowGeometry geometry;
  int width;
  Parameter weight;
};

// The sum over all threads of a row
__device__ __forceinline__ float row_sum(float value) { return blockDim.y > 1 ? warp_sum(value) : block_sum(value); }

// The first column of the i-th vector of this thread
template <int V>
__device__ __forceinline__ int column_of(int i) {
  return static_cast<int>(i * blockDim.x + threadIdx.x) * V;
}

template <int N, typename T>
__device__ __forceinline__ void load_as_floats(const T* from, float* to) {
  const Vector<T, N> vector = load<N>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(vector[i]);
}

// V elements of the weight from `column` on, which lie one after the other unless V is 1
template <int V>
__device__ __forceinline__ void read_weight(const Parameter& weight, int column, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = load_as_float(weight.data, weight.dtype, column * weight.stride_c);
  } else {
    switch (weight.dtype) {
      case DType::kHalf: return load_as_floats<V>(static_cast<const __half*>(weight.data) + column, to);
      case DType::kBFloat16: return load_as_floats<V>(static_cast<const __nv_bfloat16*>(weight.data) + column, to);
      default:
#pragma unroll
        for (int i = 0; i < V; i += 4) load_as_floats<4>(static_cast<const float*>(weight.data) + column + i, to + i);
    }
  }
}

// The vectors of a row that are this thread's
template <typename T, int V, int kVectors>
__device__ __forceinline__ void load_row(const T* row, int width, Vector<T, V> (&held)[kVectors]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = column_of<V>(i);
    if (column < width) held[i] = load<V>(row + column);
  }
}

// Calls function(i, column) for each of them.
template <int V, int kVectors, typename Function>
__device__ __forceinline__ void for_held(int width, Function function) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = column_of<V>(i);
    if (column < width) function(i, column);
  }
}

}  // namespace imagen_fast::rms_norm::device
