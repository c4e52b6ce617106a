// Tiles of rows in shared memory, and their products.
//
// A warp multiplies 16 rows at a time. What it gets lies in registers as mma_m16n8k16 has it: of each 16 x 8 elements a
// lane holds four, in rows l / 4 and l / 4 + 8 and columns 2 (l % 4) and the next. In 16 bits the products are tensor
// cores', with sums in float; float is multiplied by float, into the same layout.
#pragma once

#include "kernel_problem.cuh"

namespace imagen_fast::attention::device {

template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements of one copy

// Rows of the tiles that a block goes through
template <typename T, int W>
constexpr int kStreamRows = sizeof(T) == 2 ? (W > 64 ? 32 : 64) : (W > 128 ? 16 : 32);

// A row of a tile has W elements. Of each eight of its chunks the order is permuted by the row, so that the same
// columns of 8 rows lie in different banks.
template <typename T, int W>
__device__ __forceinline__ int place_in_tile(int row, int column) {
  const int chunk = column / kChunk<T>;
  return row * W + ((chunk & ~7) + ((chunk ^ row) & 7)) * kChunk<T> + column % kChunk<T>;
}

// Starts to bring `tile_rows` rows into a tile, of which `rows` are there, `width` wide; the rest becomes zero.
template <typename T, int W>
__device__ __forceinline__ void load_tile(const T* from, const Rows& like, int tile_rows, int rows, int width,
                                          T* tile) {
  constexpr int kChunks = W / kChunk<T>;
  const int threads = block_threads();
  for (int i = opaque(thread_rank()); i < tile_rows * kChunks; i += threads) {
    const int row = i / kChunks, column = i % kChunks * kChunk<T>;
    const bool inside = row < rows && column < width;
    const T* source = inside ? from + row * like.stride_l + column : from;
    T* to = tile + place_in_tile<T, W>(row, column);
    if (like.aligned) {
      copy_async_16(to, source, inside ? 16 : 0);
    } else {
      for (int e = 0; e < kChunk<T>; ++e) to[e] = inside ? source[e] : from_float<T>(0.0f);
    }
  }
}

// For ldmatrix: where a lane has its row's chunk of columns that are multiples of 16, or the chunk after it. That is
// `place_in_tile(row, column + 8 * second)`, by few instructions from few registers.
template <int W>
struct LanePlace {
  __device__ __forceinline__ LanePlace(int row, int second)
      : start_(opaque(row * W)), permutation_(opaque(((row ^ second) & 7) * 8)) {}

  // `column` is known to the compiler.
  __device__ __forceinline__ int operator()(int column) const {
    return start_ + (column & ~63) + ((column & 48) ^ permutation_);
  }

 private:
  int start_;
  int permutation_;
};

__device__ __forceinline__ void multiply_add(const Vector<float, 4>& a, const Vector<float, 4>& b, float& sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fmaf(a[i], b[i], sum);
}

// acc[m] += A B^T: A is rows first_row + 16 m … of one tile, B the first 8 NB rows of another; both `width` wide.
template <typename T, int W, int MT, int NB>
__device__ __forceinline__ void multiply(const T* a_tile, int first_row, const T* b_tile, int width,
                                         float (&acc)[MT][NB][4]) {
  if constexpr (sizeof(T) == 2) {
    static_assert(NB % 2 == 0, "columns are loaded by 16");
    const LanePlace<W> a_place(lane() % 16, lane() / 16);
    const LanePlace<W> b_place(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
    a_tile += first_row * W;
#pragma unroll
    for (int k = 0; k < W; k += 16) {
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        ldmatrix_x4(a[m], a_tile + 16 * m * W + a_place(k));
      }
#pragma unroll
      for (int n = 0; n < NB; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, b_tile + 8 * n * W + b_place(k));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma_m16n8k16<T>(acc[m][n], a[m], left);
          mma_m16n8k16<T>(acc[m][n + 1], a[m], right);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < width; k += 4) {
      Vector<float, 4> a[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[m][half] = load<4>(a_tile + place_in_tile<T, W>(first_row + 16 * m + 8 * half + row_of_lane(), k));
        }
      }
#pragma unroll
      for (int n = 0; n < NB; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Vector<float, 4> b = load<4>(b_tile + place_in_tile<T, W>(8 * n + column_of_lane() + e, k));
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            multiply_add(a[m][0], b, acc[m][n][e]);
            multiply_add(a[m][1], b, acc[m][n][2 + e]);
          }
        }
      }
    }
  }
}

// A stage holds rows of 8 NB floats for each warp, for other lanes to read.
template <int NB>
constexpr int kStageRow = 8 * NB + 4;

template <typename T>
__host__ __device__ constexpr int stage_bytes(int rows, int columns, bool wanted) {
  return sizeof(T) == 4 || wanted ? rows * (columns + 4) * 4 : 0;
}

// This warp's rows; lanes may read them after __syncwarp.
template <int MT, int NB>
__device__ __forceinline__ void write_stage(const float (&values)[MT][NB][4], float* stage) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = stage + (16 * m + 8 * half + row_of_lane()) * kStageRow<NB> + 8 * n + column_of_lane();
        store<2>(to, Vector<float, 2>{values[m][n][2 * half], values[m][n][2 * half + 1]});
      }
    }
  }
}

// acc[m] += values[m] B: B is the first 8 NB rows of a tile. 16-bit values are rounded to T; floats are read from the
// stage, this warp's rows of it.
template <typename T, int W, int MT, int NB>
__device__ __forceinline__ void accumulate(const float (&values)[MT][NB][4], float* stage, const T* b_tile,
                                           float (&acc)[MT][W / 8][4]) {
  if constexpr (sizeof(T) == 2) {
    const LanePlace<W> b_place(lane() % 16, lane() / 16);
#pragma unroll
    for (int k = 0; k < NB; k += 2) {
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &values[m][k + i / 2][2 * (i % 2)];
          a[m][i] = pack2<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < W / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, b_tile + 8 * k * W + b_place(8 * n));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          mma_m16n8k16<T>(acc[m][n], a[m], left);
          mma_m16n8k16<T>(acc[m][n + 1], a[m], right);
        }
      }
    }
  } else {
    __syncwarp();  // what was staged before has been read
    write_stage(values, stage);
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < 8 * NB; ++k) {
      float a[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[m][half] = stage[(16 * m + 8 * half + row_of_lane()) * kStageRow<NB> + k];
        }
      }
#pragma unroll
      for (int n = 0; n < W / 8; ++n) {
        const Vector<float, 2> b = load<2>(b_tile + place_in_tile<T, W>(k, 8 * n + column_of_lane()));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][n][e] = fmaf(a[m][e / 2], b[e % 2], acc[m][n][e]);
        }
      }
    }
  }
}

template <int MT, int NB>
__device__ __forceinline__ void set_zero(float (&acc)[MT][NB][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NB; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
    }
  }
}

// The sum over the four lanes that hold a row
__device__ __forceinline__ float row_sum(float value) { return warp_sum<4>(value); }

}  // namespace imagen_fast::attention::device
