// What the CUDA kernels of attention share: the problem, and the keys that they go through.
#pragma once

#include "../common/cuda.cuh"
#include "problem.h"

namespace imagen_fast::attention::device {

// (B, H, L, D) with a stride of 1 along D
struct Rows {
  const void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_l;
  bool aligned;  // every row to 16 bytes

  template <typename T>
  __device__ __forceinline__ const T* at(int b, int h, int first) const {
    return static_cast<const T*>(data) + b * stride_b + h * stride_h + first * stride_l;
  }
};

// Likewise, to be written; elements are float if `wide`, whatever those of q are.
struct Output {
  void* data;
  int64_t stride_b;
  int64_t stride_h;
  int64_t stride_l;
  bool wide;
};

struct Segment {
  Rows k;
  Rows v;
  int count;
  int first;  // of its keys among all keys
};

// As ../problem.h has it. In the backward pass rows of q and k that are to be normalised have been.
struct Problem {
  int q_heads;
  int kv_heads;
  int queries;
  int width;
  float scale;
  int stages;  // tiles of a stream in shared memory: 1, or 2, of which one is on its way
  Rows q;
  Segment context;
  Segment own;
  Bias bias;
  RelativeBias relative;
  const bool* key_mask;
  int64_t key_mask_stride;

  __device__ __forceinline__ int kv_head(int q_head) const { return q_head / (q_heads / kv_heads); }
};

// One block's place: a sample, a head, and the first of its rows
struct Place {
  int b;
  int h;
  int first;

  __device__ __forceinline__ Place(int rows_of_block, int rows, int heads) {
    const unsigned blocks = static_cast<unsigned>(ceil_div(rows, rows_of_block));
    const unsigned head = blockIdx.x / blocks;
    b = static_cast<int>(head / heads);
    h = static_cast<int>(head % heads);
    first = static_cast<int>(blockIdx.x % blocks) * rows_of_block;
  }
};

// Some keys of one segment: those of the context come first, and no tile has keys of both.
struct KeyTile {
  bool own;
  int first;  // in the segment
  int count;

  __device__ __forceinline__ const Segment& segment(const Problem& p) const { return own ? p.own : p.context; }
};

__host__ __device__ inline int key_tiles(const Problem& p, int keys) {
  return ceil_div(p.context.count, keys) + ceil_div(p.own.count, keys);
}

__device__ __forceinline__ KeyTile key_tile(const Problem& p, int keys, int index) {
  const int of_context = ceil_div(p.context.count, keys);
  KeyTile tile;
  tile.own = index >= of_context;
  tile.first = (tile.own ? index - of_context : index) * keys;
  const int left = tile.segment(p).count - tile.first;
  tile.count = left < keys ? left : keys;
  return tile;
}

// Where a thread has its elements of a product: those of rows row, row + 8 and columns col, col + 1 of each 16 x 8
// (Unsigned, so that the compiler knows that they are not negative; blocks have one dimension.)
__device__ __forceinline__ int row_of_lane() { return static_cast<int>(threadIdx.x % kWarpSize / 4); }
__device__ __forceinline__ int column_of_lane() { return static_cast<int>(threadIdx.x % 4 * 2); }

// Scores are in natural units. In 16 bits the special function unit's exponential is good enough.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(T) == 2) {
    return fast_exp2(x * 1.4426950408889634f);
  } else {
    return expf(x);
  }
}

template <typename T>
__device__ __forceinline__ void store_pair(T* to, float x, float y) {
  store<2>(to, Vector<T, 2>{from_float<T>(x), from_float<T>(y)});
}

// The columns of 16 rows in products' layout, NB of 8 columns: rows beyond `rows` and columns beyond `width` are not
// written. `first` is the row of the tile's first.
template <typename T, int NB>
__device__ __forceinline__ void store_rows(const Output& to, int b, int h, int first, int rows, int width,
                                           const float (&acc)[NB][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 8 * half + row_of_lane();
    if (row >= rows) continue;
    const int64_t at = b * to.stride_b + h * to.stride_h + (first + row) * to.stride_l + column_of_lane();
#pragma unroll
    for (int n = 0; n < NB; ++n) {
      if (8 * n >= width) break;
      if (to.wide) {
        store_pair(static_cast<float*>(to.data) + at + 8 * n, acc[n][2 * half], acc[n][2 * half + 1]);
      } else {
        store_pair(static_cast<T*>(to.data) + at + 8 * n, acc[n][2 * half], acc[n][2 * half + 1]);
      }
    }
  }
}

}  // namespace imagen_fast::attention::device
