// Scores of l2-normalised queries and keys, of tiles in shared memory.
//
// The product of q / |q| q_scale and k / |k| k_scale is that of q / |q| q_scale k_scale and k, divided by |k|. So a
// block writes back its queries, once, and leaves the keys as they are: it needs the length of each, by which a column
// of products is divided. Lengths are at least 1e-12.
#pragma once

#include "kernel_rows.cuh"
#include "kernel_tile.cuh"

namespace imagen_fast::attention::device {

// A warp's rows of a tile of queries, in place; its lanes may read them after that.
template <typename T, int W, int MT>
__device__ __forceinline__ void normalize_queries(const Parameter& q_scale, const Parameter& k_scale, int width,
                                                  int first_row, T* tile) {
  constexpr int kElements = W / kWarpSize;
  float scale[kElements], of_keys[kElements], x[kElements];
  load_scale(q_scale, width, scale);
  load_scale(k_scale, width, of_keys);
#pragma unroll
  for (int i = 0; i < kElements; ++i) scale[i] *= of_keys[i];
#pragma unroll 1
  for (int row = first_row; row < first_row + 16 * MT; ++row) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = to_float(tile[place_in_tile<T, W>(row, kWarpSize * i + lane())]);
    const float inverse = inverse_norm(x);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      tile[place_in_tile<T, W>(row, kWarpSize * i + lane())] = from_float<T>(x[i] * inverse * scale[i]);
    }
  }
  __syncwarp();
}

// 1 / |k| for each of the kRows rows of a tile of keys, by the whole block
template <typename T, int W, int kRows>
__device__ __forceinline__ void write_inverse_lengths(const T* tile, float* inverse) {
  constexpr int kLanes = 8;  // to a row: together they read it without a conflict of banks
  static_assert(kRows * kLanes % kWarpSize == 0 && W / kChunk<T> % kLanes == 0);
  const int threads = block_threads();
#pragma unroll 1
  for (int i = opaque(thread_rank()); i < kRows * kLanes; i += threads) {
    const int row = i / kLanes;
    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < W / kChunk<T>; chunk += kLanes) {
      const auto x = load<kChunk<T>>(tile + place_in_tile<T, W>(row, (chunk + i % kLanes) * kChunk<T>));
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        const float value = to_float(x[e]);
        sum = fmaf(value, value, sum);
      }
    }
    sum = warp_sum<kLanes>(sum);
    if (i % kLanes == 0) inverse[row] = inverse_of_length(sqrtf(sum));
  }
}

// Columns of products of a warp's rows with the keys of a tile, each by its factor
template <int MT, int NB>
__device__ __forceinline__ void multiply_columns(const float* factors, float (&s)[MT][NB][4]) {
#pragma unroll
  for (int n = 0; n < NB; ++n) {
    const Vector<float, 2> pair = load<2>(factors + 8 * n + column_of_lane());
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] *= pair[e % 2];
    }
  }
}

}  // namespace imagen_fast::attention::device
