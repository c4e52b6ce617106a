// The forward pass of attention: out = softmax(scores) v, lse = the log of the sum of the scores' exponentials.
//
// A block has some queries of one head, 16 or 32 to a warp, and goes through all keys, a tile at a time: while it
// computes on one tile the next one is copied to shared memory. For each query the largest score so far m, the sum l of
// exp(s - m) and the weighted sum of values follow the tiles (Dao et al. 2022, arXiv:2205.14135; 2023,
// arXiv:2307.08691).
#pragma once

#include "kernel_normalized_tiles.cuh"
#include "kernel_scores.cuh"

namespace imagen_fast::attention::device {

struct Forward : Problem {
  Parameter q_scale;  // of rows that are to be normalised, if its data is not null
  Parameter k_scale;
  Output out;
  float* lse;  // (B, Hq, Lq)
};

// At most: tiles of 128 queries have 8 warps where registers do not hold 32 rows of a warp.
template <int W>
constexpr int kForwardThreads = W == 128 ? 256 : 128;

// Bytes from the start of dynamic shared memory: the queries are there.
struct ForwardShared {
  int stream;  // keys and values of each stage
  int stage;
  int lengths;  // inverse, of the keys of a tile
  int window;
  int bytes;
};

template <typename T, int W>
__host__ __device__ constexpr ForwardShared forward_shared(int rows, int stages, bool bias, bool normalized,
                                                           bool window) {
  constexpr int kKeys = kStreamRows<T, W>;
  constexpr int kElement = static_cast<int>(sizeof(T));
  ForwardShared s{};
  s.stream = rows * W * kElement;
  s.stage = s.stream + stages * 2 * kKeys * W * kElement;
  s.lengths = s.stage + stage_bytes<T>(rows, kKeys, bias);
  s.window = s.lengths + (normalized ? kKeys * 4 : 0);
  s.bytes = s.window + (window ? window_length(rows) * 4 : 0);
  return s;
}

// The running softmax of a warp's rows; a lane sums over its own columns.
template <int MT>
struct Softmax {
  float most[MT][2];
  float sum[MT][2];
};

// Scores become exp(s - most), and what has been summed so far is brought to the new most.
template <typename T, int MT, int NB, int DB>
__device__ __forceinline__ void exponentiate(float (&s)[MT][NB][4], Softmax<MT>& softmax, float (&acc)[MT][DB][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = softmax.most[m][half];
#pragma unroll
      for (int n = 0; n < NB; ++n) most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      most = warp_max<4>(most);
      const float finite = most == -kInfinity ? 0.0f : most;
      const float decay = exponential<T>(softmax.most[m][half] - finite);
      float sum = softmax.sum[m][half] * decay;
#pragma unroll
      for (int n = 0; n < NB; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[m][n][e] = exponential<T>(s[m][n][e] - finite);
          sum += s[m][n][e];
        }
      }
      softmax.most[m][half] = most;
      softmax.sum[m][half] = sum;
#pragma unroll
      for (int n = 0; n < DB; ++n) {
        acc[m][n][2 * half] *= decay;
        acc[m][n][2 * half + 1] *= decay;
      }
    }
  }
}

template <typename T, int W, int MT>
__device__ __forceinline__ void finish_forward(const Forward& f, const Place& place, int first, Softmax<MT>& softmax,
                                               float (&acc)[MT][W / 8][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(softmax.sum[m][half]);
      const float inverse = 1.0f / sum;
#pragma unroll
      for (int n = 0; n < W / 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) acc[m][n][e] = sum == 0.0f ? 0.0f : acc[m][n][e] * inverse;
      }
      const int query = first + 16 * m + 8 * half + row_of_lane();
      if (column_of_lane() == 0 && query < f.queries) {
        const int64_t head = static_cast<int64_t>(place.b) * f.q_heads + place.h;
        f.lse[head * f.queries + query] = softmax.most[m][half] + logf(sum);
      }
    }
    store_rows<T>(f.out, place.b, place.h, first + 16 * m, f.queries - first - 16 * m, f.width, acc[m]);
  }
}

// Grid: a block for each 16 MT queries to a warp of each head.
template <typename T, int W, int MT>
__global__ void __launch_bounds__(kForwardThreads<W>, 1) forward(const __grid_constant__ Forward f) {
  constexpr int kKeys = kStreamRows<T, W>;
  constexpr int kBlocks = kKeys / 8;
  const int rows = 16 * MT * (block_threads() / kWarpSize);
  const Place place(rows, f.queries, f.q_heads);
  const int kv_head = f.kv_head(place.h);
  const bool relative = f.relative.data != nullptr;
  const bool normalized = f.q_scale.data != nullptr;
  const ForwardShared shared = forward_shared<T, W>(rows, f.stages, f.bias.data, normalized, relative);
  T* q = dynamic_shared<T>();
  T* stream = reinterpret_cast<T*>(dynamic_shared() + shared.stream);
  const int warp_row = 16 * MT * warp_rank();
  float* stage = reinterpret_cast<float*>(dynamic_shared() + shared.stage) + warp_row * kStageRow<kBlocks>;
  float* lengths = reinterpret_cast<float*>(dynamic_shared() + shared.lengths);
  const Window window{reinterpret_cast<float*>(dynamic_shared() + shared.window), nullptr, nullptr};

  const int tiles = key_tiles(f, kKeys);
  const auto keys_at = [&](int index) { return stream + (f.stages == 2 && index % 2 ? 2 * kKeys * W : 0); };
  const auto load_keys = [&](int index) {
    const KeyTile tile = key_tile(f, kKeys, index);
    const Segment& segment = tile.segment(f);
    T* to = keys_at(index);
    load_tile<T, W>(segment.k.at<T>(place.b, kv_head, tile.first), segment.k, kKeys, tile.count, f.width, to);
    load_tile<T, W>(segment.v.at<T>(place.b, kv_head, tile.first), segment.v, kKeys, tile.count, f.width,
                    to + kKeys * W);
    copy_async_commit();
  };

  float acc[MT][W / 8][4];
  set_zero(acc);
  Softmax<MT> softmax;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) softmax.most[m][half] = -kInfinity, softmax.sum[m][half] = 0.0f;
  }
  if (tiles > 0) {
    load_tile<T, W>(f.q.at<T>(place.b, place.h, place.first), f.q, rows, f.queries - place.first, f.width, q);
    load_keys(0);
  }
  const int first = place.first + warp_row;  // this warp's first query
  for (int index = 0; index < tiles; ++index) {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before it has been used
    if (f.stages == 2 && index + 1 < tiles) load_keys(index + 1);
    const KeyTile tile = key_tile(f, kKeys, index);
    if (relative && tile.own && tile.first % kWindow == 0) {
      fill_window(f, place.h, tile.first - place.first + f.queries - rows, true, window_length(rows), window, false);
      __syncthreads();
    }
    if (normalized) {
      if (index == 0) normalize_queries<T, W, MT>(f.q_scale, f.k_scale, f.width, warp_row, q);
      write_inverse_lengths<T, W, kKeys>(keys_at(index), lengths);
      __syncthreads();
    }
    if (first < f.queries) {
      const T* k = keys_at(index);
      float s[MT][kBlocks][4];
      set_zero(s);
      multiply<T, W>(q, warp_row, k, f.width, s);
      if (normalized) multiply_columns(lengths, s);
      finish_scores(f, place.b, place.h, first, tile,
                    window.values + window_place(rows, warp_row, tile.first % kWindow), stage, s);
      exponentiate<T>(s, softmax, acc);
      accumulate<T, W>(s, stage, k + kKeys * W, acc);
    }
    if (f.stages == 1 && index + 1 < tiles) {
      __syncthreads();  // the tile has been used
      load_keys(index + 1);
    }
  }
  if (first < f.queries) finish_forward<T, W>(f, place, first, softmax, acc);
}

}  // namespace imagen_fast::attention::device
