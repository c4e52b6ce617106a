// The backward pass of attention. Scores s and weights P are computed again:
//
//   P = exp(s - lse)    dP = dout vT    dS = P (dP - delta)    delta = sum_j P dP
//   dv = PT dout    dq = scale dS k    dk = scale dST q    dbias = dS
//
// Each sum is taken by one block, in one order: the gradients of queries by a block that goes through the keys, those
// of keys by one that goes through the queries of all heads that read them, that of a bias by one that goes through
// whatever the bias is broadcast over. So nothing depends on who is first, at the cost of computing P and dP for each.
//
// First come each query's statistics. delta is taken from P and dP as they are, not from out, which has been rounded:
// where a query attends to one key almost alone, the small difference dP - delta would be lost in that. And lse is
// rounded by as much as it is large, so weights are divided by what their sum turns out to be.
#pragma once

#include "kernel_scores.cuh"

namespace imagen_fast::attention::device {

struct Backward : Problem {
  Rows dout;
  const float* lse;   // (B, Hq, Lq)
  float* statistics;  // (B, Hq, 3, statistics_stride): shift, factor, delta, so that P = exp(s - shift) factor
  int statistics_stride;

  __device__ __forceinline__ float* statistics_of(int b, int h) const {
    return statistics + (static_cast<int64_t>(b) * q_heads + h) * 3 * statistics_stride;
  }
};

// What the gradients of queries need besides
struct QueryGradients : Backward {
  Output dq;      // not asked for if data is null
  float* dtable;  // (B, blocks of queries, Hq, rows): each block's part; not asked for if null
};

// What the gradients of the keys of one segment need besides
struct KeyGradients : Backward {
  bool of_own;
  Output dk;  // not asked for if data is null
  Output dv;
};

struct BiasGradients : Backward {
  BiasGradient dbias;  // one for each key
  int samples;         // B
};

constexpr int kBackwardThreads = 256;  // at most

// Bytes from the start of dynamic shared memory: a block's own rows, two tiles, are there.
struct BackwardShared {
  int stream;      // of each stage: two tiles
  int statistics;  // of each stage: of the tile's queries
  int stage;
  int window;
  int bytes;
};

// For gradients of queries; `dtable` if the table's is collected
template <typename T, int W>
__host__ __device__ constexpr BackwardShared query_shared(int rows, int stages, bool bias, bool window, bool dtable) {
  constexpr int kRows = kStreamRows<T, W>;
  constexpr int kElement = static_cast<int>(sizeof(T));
  BackwardShared s{};
  s.stream = 2 * rows * W * kElement;
  s.statistics = s.stage = s.stream + stages * 2 * kRows * W * kElement;
  s.window = s.stage + stage_bytes<T>(rows, kRows, bias || dtable);
  s.bytes = s.window + (window ? window_length(rows) * 4 * (dtable ? 3 : 1) : 0);
  return s;
}

// For gradients of keys
template <typename T, int W>
__host__ __device__ constexpr BackwardShared key_shared(int rows, int stages, bool bias, bool window) {
  constexpr int kRows = kStreamRows<T, W>;
  BackwardShared s = query_shared<T, W>(rows, stages, bias, false, false);
  s.statistics = s.stage;
  s.stage = s.statistics + stages * 3 * kRows * 4;
  s.window = s.bytes + s.stage - s.statistics;
  s.bytes = s.window + (window ? window_length(rows) * 4 : 0);
  return s;
}

// ---- Gradients of queries, and before them the statistics

// The sums over the tile's diagonals, into the window's
template <int NB>
__device__ __forceinline__ void sum_diagonals(const float* stage, int rows, int rows_there, float* sums) {
  constexpr int kColumns = 8 * NB;
  const int threads = block_threads();
  for (int k = thread_rank(); k < rows + kColumns - 1; k += threads) {
    const int offset = k - (rows - 1);  // column minus row
    const int begin = max(0, -offset), end = min(rows_there, kColumns - offset);
    float sum = 0.0f;
    for (int row = begin; row < end; ++row) sum += stage[row * kStageRow<NB> + row + offset];
    if (begin < end) sums[k] += sum;
  }
}

// The window's sums, into the buckets of its diagonals. The first window sets them.
__device__ __forceinline__ void fold_window(const Window& window, int length, int buckets, bool set, float* to) {
  const int warps = block_threads() / kWarpSize;
  for (int bucket = warp_rank(); bucket < buckets; bucket += warps) {
    float sum = 0.0f;
    for (int k = lane(); k < length; k += kWarpSize) sum += window.buckets[k] == bucket ? window.sums[k] : 0.0f;
    sum = warp_sum(sum);
    if (lane() == 0) to[bucket] = set ? sum : to[bucket] + sum;
  }
}

// Grid: a block for each 16 queries to a warp of each head.
template <typename T, int W, bool kQueries>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_queries(const __grid_constant__ QueryGradients f) {
  constexpr int kKeys = kStreamRows<T, W>;
  constexpr int kBlocks = kKeys / 8;
  const int rows = 16 * (block_threads() / kWarpSize);
  const Place place(rows, f.queries, f.q_heads);
  const int kv_head = f.kv_head(place.h);
  const bool relative = f.relative.data != nullptr;
  const bool with_table = kQueries && f.dtable != nullptr;
  const BackwardShared shared = query_shared<T, W>(rows, f.stages, f.bias.data, relative, with_table);
  T* q = dynamic_shared<T>();
  T* dout = q + rows * W;
  T* stream = reinterpret_cast<T*>(dynamic_shared() + shared.stream);
  const int warp_row = 16 * warp_rank();
  float* block_stage = reinterpret_cast<float*>(dynamic_shared() + shared.stage);
  float* stage = block_stage + warp_row * kStageRow<kBlocks>;
  const int length = window_length(rows);
  float* values = reinterpret_cast<float*>(dynamic_shared() + shared.window);
  const Window window{values, reinterpret_cast<int*>(values + 2 * length), values + length};
  const int buckets = static_cast<int>(f.relative.rows);
  const int64_t head = static_cast<int64_t>(place.b) * f.q_heads + place.h;
  float* dtable = nullptr;
  if (with_table) {
    const int64_t blocks = ceil_div(f.queries, rows);
    dtable = f.dtable + ((place.b * blocks + place.first / rows) * f.q_heads + place.h) * buckets;
  }

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
  const int left = f.queries - place.first;
  load_tile<T, W>(f.q.at<T>(place.b, place.h, place.first), f.q, rows, left, f.width, q);
  load_tile<T, W>(f.dout.at<T>(place.b, place.h, place.first), f.dout, rows, left, f.width, dout);
  if (tiles > 0) load_keys(0);

  const int first = place.first + warp_row;  // this warp's first query
  float* const statistics = f.statistics_of(place.b, place.h);
  float shift[2], factor[2] = {0.0f, 0.0f}, delta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + 8 * half + row_of_lane();
    const bool there = query < f.queries;
    if constexpr (kQueries) {
      shift[half] = there ? statistics[query] : 0.0f;
      factor[half] = there ? statistics[f.statistics_stride + query] : 0.0f;
      delta[half] = there ? statistics[2 * f.statistics_stride + query] : 0.0f;
    } else {
      const float lse = there ? f.lse[head * f.queries + query] : 0.0f;
      shift[half] = lse == -kInfinity ? 0.0f : lse;
    }
  }
  float acc[1][kQueries ? W / 8 : 1][4];
  set_zero(acc);

  bool folded = false;
  for (int index = 0; index < tiles; ++index) {
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before it has been used
    if (f.stages == 2 && index + 1 < tiles) load_keys(index + 1);
    const KeyTile tile = key_tile(f, kKeys, index);
    if (relative && tile.own && tile.first % kWindow == 0) {
      if (with_table && tile.first > 0) {
        fold_window(window, length, buckets, !folded, dtable);
        folded = true;
        __syncthreads();
      }
      fill_window(f, place.h, tile.first - place.first + f.queries - rows, true, length, window, with_table);
      __syncthreads();
    }
    const int window_at = window_place(rows, warp_row, tile.first % kWindow);
    float s[1][kBlocks][4], dp[1][kBlocks][4];
    if (first < f.queries) {
      const T* k = keys_at(index);
      set_zero(s);
      multiply<T, W>(q, warp_row, k, f.width, s);
      finish_scores(f, place.b, place.h, first, tile, values + window_at, stage, s);
      set_zero(dp);
      multiply<T, W>(dout, warp_row, k + kKeys * W, f.width, dp);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = exponential<T>(s[0][n][e] - shift[e / 2]);
          if constexpr (kQueries) {
            dp[0][n][e] = p * factor[e / 2] * (dp[0][n][e] - delta[e / 2]);
          } else {
            factor[e / 2] += p;
            delta[e / 2] = fmaf(p, dp[0][n][e], delta[e / 2]);
          }
        }
      }
      if constexpr (kQueries) {
        if (with_table && sizeof(T) == 2) write_stage(dp, stage);
        accumulate<T, W>(dp, stage, k, acc);
      }
    }
    if (with_table && tile.own) {
      __syncthreads();
      const int there = min(rows, left);
      sum_diagonals<kBlocks>(block_stage, rows, there, window.sums + tile.first % kWindow);
    }
    if (f.stages == 1 && index + 1 < tiles) {
      __syncthreads();  // the tile has been used
      load_keys(index + 1);
    }
  }
  if (with_table) {
    __syncthreads();
    if (f.own.count > 0) {
      fold_window(window, length, buckets, !folded, dtable);
    } else {
      for (int bucket = thread_rank(); bucket < buckets; bucket += block_threads()) dtable[bucket] = 0.0f;
    }
  }
  if (first >= f.queries) return;
  if constexpr (kQueries) {
    if (!f.dq.data) return;
    multiply_by(f.scale, acc);
    store_rows<T>(f.dq, place.b, place.h, first, f.queries - first, f.width, acc[0]);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(factor[half]);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: there is nothing to attend to
      const float total = row_sum(delta[half]);
      const int query = first + 8 * half + row_of_lane();
      if (column_of_lane() == 0 && query < f.queries) {
        statistics[query] = shift[half];
        statistics[f.statistics_stride + query] = inverse;
        statistics[2 * f.statistics_stride + query] = total * inverse;
      }
    }
  }
}

}  // namespace imagen_fast::attention::device
