// The gradient of a bias that has an element for each key; see kernel_backward.cuh. (One that all keys of a query share
// does not change the softmax: its gradient is 0.)
#pragma once

#include "kernel_backward.cuh"

namespace imagen_fast::attention::device {

// Bytes from the start of dynamic shared memory; the stages, of queries, dout, keys and values, come first.
struct BiasShared {
  int stage;
  int sums;  // of each warp
  int bytes;
};

template <typename T, int W>
__host__ __device__ constexpr BiasShared bias_shared(int rows, int stages) {
  constexpr int kKeys = kStreamRows<T, W>;
  BiasShared s{};
  s.stage = stages * 2 * (rows + kKeys) * W * static_cast<int>(sizeof(T));
  s.sums = s.stage + stage_bytes<T>(rows, kKeys, true);
  s.bytes = s.sums + rows / 16 * kKeys * 4;
  return s;
}

__device__ __forceinline__ void store_gradient(const BiasGradient& gradient, int64_t i, float value) {
  switch (gradient.dtype) {
    case DType::kHalf: static_cast<__half*>(gradient.data)[i] = from_float<__half>(value); return;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(gradient.data)[i] = from_float<__nv_bfloat16>(value); return;
    default: static_cast<float*>(gradient.data)[i] = value; return;
  }
}

// What a block goes through: the samples, heads and blocks of queries that share its part of the bias
struct Shared {
  int b, h, query;
};

// Grid: a block for each tile of keys, of each 16 queries to a warp if the bias has queries, of each of the bias's
// heads and samples.
template <typename T, int W>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_bias(const __grid_constant__ BiasGradients f) {
  constexpr int kKeys = kStreamRows<T, W>;
  constexpr int kBlocks = kKeys / 8;
  const int rows = 16 * (block_threads() / kWarpSize);
  const BiasShared shared = bias_shared<T, W>(rows, f.stages);
  T* stream = dynamic_shared<T>();
  float* sums = reinterpret_cast<float*>(dynamic_shared() + shared.sums);
  const bool per_query = f.dbias.queries > 1;
  const int query_blocks = ceil_div(f.queries, rows);
  const int blocks = per_query ? query_blocks : 1;

  unsigned number = blockIdx.x;
  const auto next = [&](int count) {
    const int i = static_cast<int>(number % static_cast<unsigned>(count));
    number /= static_cast<unsigned>(count);
    return i;
  };
  const KeyTile tile = key_tile(f, kKeys, next(key_tiles(f, kKeys)));
  const int block = next(blocks);
  const int bias_h = next(static_cast<int>(f.dbias.heads));
  const int bias_b = static_cast<int>(number);
  const Segment& segment = tile.segment(f);

  const int over_h = f.q_heads / static_cast<int>(f.dbias.heads), over_q = query_blocks / blocks;
  const int count = f.samples / static_cast<int>(f.dbias.batch) * over_h * over_q;
  const auto shared_at = [&](int index) {
    const int query = per_query ? block : index % over_q;
    const int h = index / over_q % over_h, b = index / over_q / over_h;
    return Shared{f.dbias.batch > 1 ? bias_b : b, f.dbias.heads > 1 ? bias_h : h, query * rows};
  };
  const int stage_elements = 2 * (rows + kKeys) * W;
  const auto stage_at = [&](int index) { return stream + (f.stages == 2 && index % 2 ? stage_elements : 0); };
  const auto load_all = [&](int index) {
    const Shared at = shared_at(index);
    const int left = f.queries - at.query, kv_head = f.kv_head(at.h);
    T* to = stage_at(index);
    load_tile<T, W>(f.q.at<T>(at.b, at.h, at.query), f.q, rows, left, f.width, to);
    load_tile<T, W>(f.dout.at<T>(at.b, at.h, at.query), f.dout, rows, left, f.width, to + rows * W);
    to += 2 * rows * W;
    load_tile<T, W>(segment.k.at<T>(at.b, kv_head, tile.first), segment.k, kKeys, tile.count, f.width, to);
    load_tile<T, W>(segment.v.at<T>(at.b, kv_head, tile.first), segment.v, kKeys, tile.count, f.width, to + kKeys * W);
    copy_async_commit();
  };

  const int warp_row = 16 * warp_rank();
  float* stage = reinterpret_cast<float*>(dynamic_shared() + shared.stage) + warp_row * kStageRow<kBlocks>;
  float total[1][kBlocks][4];
  set_zero(total);
  load_all(0);
  for (int index = 0; index < count; ++index) {
    copy_async_wait<0>();
    __syncthreads();  // the tiles are there, and those before them have been used
    if (f.stages == 2 && index + 1 < count) load_all(index + 1);
    const Shared at = shared_at(index);
    const int first = at.query + warp_row;
    if (first < f.queries) {
      const float* statistics = f.statistics_of(at.b, at.h);
      const T* q = stage_at(index);
      const T* k = q + 2 * rows * W;
      float s[1][kBlocks][4], dp[1][kBlocks][4];
      set_zero(s);
      multiply<T, W>(q, warp_row, k, f.width, s);
      finish_scores(f, at.b, at.h, first, tile, static_cast<const float*>(nullptr), stage, s);
      set_zero(dp);
      multiply<T, W>(q + rows * W, warp_row, k + kKeys * W, f.width, dp);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = first + 8 * half + row_of_lane();
        if (query >= f.queries) continue;
        const float shift = statistics[query];
        const float factor = statistics[f.statistics_stride + query];
        const float delta = statistics[2 * f.statistics_stride + query];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            total[0][n][e] += exponential<T>(s[0][n][e] - shift) * factor * (dp[0][n][e] - delta);
          }
        }
      }
    }
    if (f.stages == 1 && index + 1 < count) {
      __syncthreads();  // the tiles have been used
      load_all(index + 1);
    }
  }

  const int64_t row_length = f.dbias.keys;
  const int64_t start = (static_cast<int64_t>(bias_b) * f.dbias.heads + bias_h) * f.dbias.queries * row_length +
                        segment.first + tile.first;
  if (per_query) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = block * rows + warp_row + 8 * half + row_of_lane();
      if (query >= f.queries) continue;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = 8 * n + column_of_lane() + e;
          if (key < tile.count) store_gradient(f.dbias, start + query * row_length + key, total[0][n][2 * half + e]);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = total[0][n][e] + total[0][n][2 + e];
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) sum += shuffle_xor(sum, offset);
      if (row_of_lane() == 0) sums[warp_rank() * kKeys + 8 * n + column_of_lane() + e] = sum;
    }
  }
  __syncthreads();
  for (int key = thread_rank(); key < tile.count; key += block_threads()) {
    float sum = 0.0f;
    for (int warp = 0; warp < block_threads() / kWarpSize; ++warp) sum += sums[warp * kKeys + key];
    store_gradient(f.dbias, start + key, sum);
  }
}

}  // namespace imagen_fast::attention::device
