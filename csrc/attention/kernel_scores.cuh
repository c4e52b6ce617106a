// From products to scores: scale, bias, mask.
//
// A warp's tile has queries as rows and keys as columns or, for the gradients of keys, keys as rows and queries as
// columns.
#pragma once

#include "kernel_tile.cuh"

namespace imagen_fast::attention::device {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- T5's relative position bias, by diagonal

// A block has the bias of its rows and of so many columns at a time in shared memory.
constexpr int kWindow = 512;

// With `sums`, the table's gradient is collected there.
struct Window {
  float* values;
  int* buckets;
  float* sums;
};

__host__ __device__ constexpr int window_length(int rows) { return kWindow + rows; }

// The window's element for a row and a column: both run over a block's rows and the window's columns, and diagonals
// grow with keys and fall with queries, so one of the two runs backwards.
__host__ __device__ constexpr int window_place(int rows, int row, int column) { return column + rows - 1 - row; }

// Fills the window with diagonals first, first + 1, … if `ascending`, else first, first - 1, …
// Diagonal d is that of query i and own key j with d = j - i + queries - 1.
__device__ __forceinline__ void fill_window(const Problem& p, int h, int first, bool ascending, int length,
                                            const Window& window, bool with_sums) {
  const int diagonals = p.queries + p.own.count - 1;
  const int threads = block_threads();
  for (int k = opaque(thread_rank()); k < length; k += threads) {
    const int d = ascending ? first + k : first - k;
    int bucket = -1;
    float value = 0.0f;
    if (d >= 0 && d < diagonals) {
      bucket = p.relative.bucket[d];
      bucket = max(0, min(bucket, static_cast<int>(p.relative.rows) - 1));
      value = load_as_float(p.relative.data, p.relative.dtype, static_cast<int64_t>(bucket) * p.q_heads + h);
    }
    window.values[k] = value;
    if (with_sums) {
      window.buckets[k] = bucket;
      window.sums[k] = 0.0f;
    }
  }
}

// `at` is the element of the warp's first row and the tile's first column.
template <int MT, int NB>
__device__ __forceinline__ void add_window(const float* at, float (&s)[MT][NB][4]) {
  at += column_of_lane() - row_of_lane();
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] += at[8 * n + e % 2 - 16 * m - 8 * (e / 2)];
    }
  }
}

// ---- A bias as a tensor

// A warp's rows of a tile, of which `rows` and `columns` are there, from a matrix with these strides to the stage;
// lanes go along the rows if `along_rows`, or the columns, whichever is dense in memory.
template <int MT, int NB, bool along_rows, typename B>
__device__ __forceinline__ void stage_matrix(const B* matrix, int64_t stride_row, int64_t stride_column, int rows,
                                             int columns, float* stage) {
  constexpr int kRows = 16 * MT, kColumns = 8 * NB;
#pragma unroll 4
  for (int i = opaque(lane()); i < kRows * kColumns; i += kWarpSize) {
    const int row = along_rows ? i % kRows : i / kColumns;
    const int column = along_rows ? i / kRows : i % kColumns;
    const bool there = row < rows && column < columns;
    stage[row * kStageRow<NB> + column] = there ? to_float(matrix[row * stride_row + column * stride_column]) : 0.0f;
  }
}

// `offset` is where the tile begins in the bias.
template <bool along_rows, int MT, int NB>
__device__ __forceinline__ void add_bias(const Bias& bias, int64_t offset, int64_t stride_row, int64_t stride_column,
                                         int rows, int columns, float* stage, float (&s)[MT][NB][4]) {
  const auto bring = [&](auto* data) {
    stage_matrix<MT, NB, along_rows>(data + offset, stride_row, stride_column, rows, columns, stage);
  };
  __syncwarp();  // what was staged before has been read
  switch (bias.dtype) {
    case DType::kHalf: bring(static_cast<const __half*>(bias.data)); break;
    case DType::kBFloat16: bring(static_cast<const __nv_bfloat16*>(bias.data)); break;
    default: bring(static_cast<const float*>(bias.data)); break;
  }
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* from = stage + (16 * m + 8 * half + row_of_lane()) * kStageRow<NB> + 8 * n + column_of_lane();
        const Vector<float, 2> pair = load<2>(from);
        s[m][n][2 * half] += pair[0];
        s[m][n][2 * half + 1] += pair[1];
      }
    }
  }
}

// ---- Scores of queries with keys

template <int MT, int NB>
__device__ __forceinline__ void multiply_by(float factor, float (&s)[MT][NB][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] *= factor;
    }
  }
}

// -inf in the columns of keys that are not there or not attended to
template <int MT, int NB>
__device__ __forceinline__ void mask_columns(const Problem& p, int b, const KeyTile& tile, float (&s)[MT][NB][4]) {
  if (tile.count == 8 * NB && !p.key_mask) return;
  const bool* mask = p.key_mask ? p.key_mask + b * p.key_mask_stride + tile.segment(p).first + tile.first : nullptr;
#pragma unroll
  for (int word = 0; word < (NB + 3) / 4; ++word) {
    const int column = 32 * word + lane();
    const bool attended = column < tile.count && (!mask || mask[column]);
    const uint32_t bits = __ballot_sync(kFullWarp, attended) >> column_of_lane();
#pragma unroll
    for (int n = 4 * word; n < 4 * word + 4 && n < NB; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool there = bits >> (8 * (n - 4 * word) + e % 2) & 1;
#pragma unroll
        for (int m = 0; m < MT; ++m) s[m][n][e] = there ? s[m][n][e] : -kInfinity;
      }
    }
  }
}

// The products of queries first_query … with the keys of a tile become scores. `window` is as for `add_window`; the
// stage is the warp's.
template <int MT, int NB>
__device__ __forceinline__ void finish_scores(const Problem& p, int b, int h, int first_query, const KeyTile& tile,
                                              const float* window, float* stage, float (&s)[MT][NB][4]) {
  multiply_by(p.scale, s);
  if (p.bias.data) {
    const int64_t offset = b * p.bias.stride_b + h * p.bias.stride_h + first_query * p.bias.stride_i +
                           (tile.segment(p).first + tile.first) * p.bias.stride_j;
    add_bias<false>(p.bias, offset, p.bias.stride_i, p.bias.stride_j, p.queries - first_query, tile.count, stage, s);
  }
  if (tile.own && p.relative.data) add_window(window, s);
  mask_columns(p, b, tile, s);
}

}  // namespace imagen_fast::attention::device
