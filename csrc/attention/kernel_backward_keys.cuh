// The gradients of keys and values, for one segment of them; see kernel_backward.cuh.
//
// Products are taken the other way around, ST = k qT and dPT = v doutT, so that a warp has the weights of its own keys
// and multiplies them by dout and q as they are.
#pragma once

#include "kernel_backward.cuh"

namespace imagen_fast::attention::device {

// A tile of the queries that read a head of keys: those of one query head after those of another
struct QueryTile {
  int h;
  int first;
  int count;
};

__device__ __forceinline__ QueryTile query_tile(const Problem& p, int kv_head, int rows, int index) {
  const int blocks = ceil_div(p.queries, rows);
  QueryTile tile;
  tile.h = kv_head * (p.q_heads / p.kv_heads) + index / blocks;
  tile.first = index % blocks * rows;
  tile.count = min(rows, p.queries - tile.first);
  return tile;
}

// The statistics of a tile's queries; zeros, and so no weights, for those that are not there
template <int kRows>
__device__ __forceinline__ void load_statistics(const Backward& f, int b, const QueryTile& tile, float* to) {
  const float* from = f.statistics_of(b, tile.h) + tile.first;
  for (int i = thread_rank(); i < 3 * kRows / 4; i += block_threads()) {
    const int kind = i / (kRows / 4), row = i % (kRows / 4) * 4;
    const int valid = max(0, min(4, tile.count - row));
    copy_async_16(to + kind * kRows + row, valid ? from + kind * f.statistics_stride + row : from, 4 * valid);
  }
}

// The products of a warp's keys with a tile of queries become scores. `keys_attended` is of this lane's two keys.
template <int NB>
__device__ __forceinline__ void finish_scores_of_keys(const KeyGradients& f, const Segment& segment, int b, int key,
                                                      const QueryTile& tile, const float* window, float* stage,
                                                      const bool (&keys_attended)[2], float (&s)[1][NB][4]) {
  multiply_by(f.scale, s);
  if (f.bias.data) {
    const int64_t offset = b * f.bias.stride_b + tile.h * f.bias.stride_h + tile.first * f.bias.stride_i +
                           (segment.first + key) * f.bias.stride_j;
    add_bias<true>(f.bias, offset, f.bias.stride_j, f.bias.stride_i, segment.count - key, tile.count, stage, s);
  }
  if (f.of_own && f.relative.data) add_window(window, s);
#pragma unroll
  for (int n = 0; n < NB; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[0][n][e] = keys_attended[e / 2] ? s[0][n][e] : -kInfinity;
  }
}

// Grid: a block for each 16 keys to a warp of each head of keys.
template <typename T, int W, bool kKeys, bool kValues>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_keys(const __grid_constant__ KeyGradients f) {
  constexpr int kRows = kStreamRows<T, W>;  // of queries
  constexpr int kBlocks = kRows / 8;
  const Segment& segment = f.of_own ? f.own : f.context;
  const int rows = 16 * (block_threads() / kWarpSize);
  const Place place(rows, segment.count, f.kv_heads);
  const bool relative = f.of_own && f.relative.data;
  const BackwardShared shared = key_shared<T, W>(rows, f.stages, f.bias.data, relative);
  T* k = dynamic_shared<T>();
  T* v = k + rows * W;
  T* stream = reinterpret_cast<T*>(dynamic_shared() + shared.stream);
  float* stream_statistics = reinterpret_cast<float*>(dynamic_shared() + shared.statistics);
  const int warp_row = 16 * warp_rank();
  float* stage = reinterpret_cast<float*>(dynamic_shared() + shared.stage) + warp_row * kStageRow<kBlocks>;
  const Window window{reinterpret_cast<float*>(dynamic_shared() + shared.window), nullptr, nullptr};

  const int tiles = f.q_heads / f.kv_heads * ceil_div(f.queries, kRows);
  const auto second = [&](int index) { return f.stages == 2 && index % 2; };
  const auto queries_at = [&](int index) { return stream + (second(index) ? 2 * kRows * W : 0); };
  const auto statistics_at = [&](int index) { return stream_statistics + (second(index) ? 3 * kRows : 0); };
  const auto load_queries = [&](int index) {
    const QueryTile tile = query_tile(f, place.h, kRows, index);
    T* to = queries_at(index);
    load_tile<T, W>(f.q.at<T>(place.b, tile.h, tile.first), f.q, kRows, tile.count, f.width, to);
    load_tile<T, W>(f.dout.at<T>(place.b, tile.h, tile.first), f.dout, kRows, tile.count, f.width, to + kRows * W);
    load_statistics<kRows>(f, place.b, tile, statistics_at(index));
    copy_async_commit();
  };
  const int left = segment.count - place.first;
  load_tile<T, W>(segment.k.at<T>(place.b, place.h, place.first), segment.k, rows, left, f.width, k);
  load_tile<T, W>(segment.v.at<T>(place.b, place.h, place.first), segment.v, rows, left, f.width, v);
  if (tiles > 0) load_queries(0);

  const int first = place.first + warp_row;  // this warp's first key
  bool attended[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first + 8 * half + row_of_lane();
    attended[half] = key < segment.count;
    if (attended[half] && f.key_mask) attended[half] = f.key_mask[place.b * f.key_mask_stride + segment.first + key];
  }
  float dk[1][kKeys ? W / 8 : 1][4], dv[1][kValues ? W / 8 : 1][4];
  set_zero(dk);
  set_zero(dv);

  for (int index = 0; index < tiles; ++index) {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before it has been used
    if (f.stages == 2 && index + 1 < tiles) load_queries(index + 1);
    const QueryTile tile = query_tile(f, place.h, kRows, index);
    if (relative && tile.first % kWindow == 0) {
      fill_window(f, tile.h, place.first - tile.first + f.queries + rows - 2, false, window_length(rows), window,
                  false);
      __syncthreads();
    }
    if (first < segment.count) {
      const T* q = queries_at(index);
      const T* dout = q + kRows * W;
      const float* statistics = statistics_at(index) + column_of_lane();
      float s[1][kBlocks][4];
      set_zero(s);
      multiply<T, W>(k, warp_row, q, f.width, s);
      finish_scores_of_keys(f, segment, place.b, first, tile,
                            window.values + window_place(rows, warp_row, tile.first % kWindow), stage, attended, s);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const Vector<float, 2> shift = load<2>(statistics + 8 * n);
        const Vector<float, 2> factor = load<2>(statistics + kRows + 8 * n);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][n][e] = exponential<T>(s[0][n][e] - shift[e % 2]) * factor[e % 2];
      }
      if constexpr (kValues) accumulate<T, W>(s, stage, dout, dv);
      if constexpr (kKeys) {
        float dp[1][kBlocks][4];
        set_zero(dp);
        multiply<T, W>(v, warp_row, dout, f.width, dp);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          const Vector<float, 2> delta = load<2>(statistics + 2 * kRows + 8 * n);
#pragma unroll
          for (int e = 0; e < 4; ++e) dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - delta[e % 2]);
        }
        accumulate<T, W>(dp, stage, q, dk);
      }
    }
    if (f.stages == 1 && index + 1 < tiles) {
      __syncthreads();  // the tile has been used
      load_queries(index + 1);
    }
  }
  if (first >= segment.count) return;
  if constexpr (kKeys) {
    if (f.dk.data) {
      multiply_by(f.scale, dk);
      store_rows<T>(f.dk, place.b, place.h, first, segment.count - first, f.width, dk[0]);
    }
  }
  if constexpr (kValues) {
    if (f.dv.data) store_rows<T>(f.dv, place.b, place.h, first, segment.count - first, f.width, dv[0]);
  }
}

}  // namespace imagen_fast::attention::device
