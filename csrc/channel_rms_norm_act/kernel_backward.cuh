// The backward pass of channel_rms_norm_act, which recomputes t = xhat * m + offset, m = weight * (1 + scale), from x.
// With dt = dy * activation'(t) and the mean over the C channels of a position P = sum(dt m xhat) / C,
//
//     dx = rstd * (dt m - xhat P)      where the norm was not below its lower bound; there, without the second term
//
// and the gradients of the parameters are made of the sums over positions S = sum dt and T = sum dt * xhat of every
// (sample, channel). A block takes several tiles in turn and leaves its S and T; `backward_join` adds them up. All sums
// have one order: there are no float atomics.
#pragma once

#include "kernel_forward.cuh"

namespace imagen_fast::channel_rms_norm_act::device {

struct Backward : Positions {
  const void* dy;
  const void* x;
  const float* rstd;   // (batch, positions)
  void* dx;            // null if it is not asked for
  float2* sums;        // (batch, channels): S and T; null if they are not asked for
  float2* block_sums;  // (batch, blocks, channels): of each block
  int blocks;          // of a sample
  int tiles;           // of a block
  int sums_bytes;      // of shared memory, for a block's sums
};

// What a position's channels have in common: dx = factor * (dt m - xhat * mean)
struct PositionTerms {
  float rstd;
  float factor;
  float mean;
};

__device__ __forceinline__ PositionTerms position_terms(float rstd, float sum, int channels) {
  if (rstd >= inverse_rms(0.0f, channels)) return {rstd, rstd, 0.0f};  // x was divided by a constant
  // A single channel is its own norm: the gradient is 0, and not what rounding leaves.
  return {rstd, channels == 1 ? 0.0f : rstd, sum / static_cast<float>(channels)};
}

// The terms of a tile's positions, for all threads to see; their means only if dx is asked for.
template <typename T, int V, bool kNhwc>
__device__ __forceinline__ void tile_terms(const Backward& f, const Tile<T, V, kNhwc>& tile,
                                           const Affines<T, V, kNhwc>& affines, const Sources<T>& source,
                                           float* scratch, PositionTerms* terms) {
  const float* rstd = f.rstd + tile.sample * f.positions + tile.chunk * f.chunk;
  if (!f.dx) {
    for (int p = static_cast<int>(threadIdx.x); p < tile.chunk_positions; p += block_threads())
      terms[p] = {rstd[p], 0.0f, 0.0f};
    __syncthreads();
    return;
  }
  with_activation<T, (V > 1)>(f.activation, [&](auto activation) {
    sum_over_channels(
        f, tile, source, scratch,
        [&](int channel, int position, float x, float dy) {
          const ChannelAffine affine = affines(channel);
          const float xhat = x * rstd[position];
          const float dt = dy * activation.slope(fmaf(xhat, affine.multiplier, affine.offset));
          return dt * affine.multiplier * xhat;
        },
        [&](int position, float sum) { terms[position] = position_terms(rstd[position], sum, tile.channels); });
  });
  __syncthreads();
}

__device__ __forceinline__ void add_to(float2* sums, float2 sum, bool first) {
  *sums = first ? sum : Sum2()(*sums, sum);
}

// dx of a tile, and its S and T, which are added to `sums` (unless this is the block's first tile). The same thread
// always has the same channels' sums.
template <typename T, int V, bool kNhwc>
__device__ __forceinline__ void tile_gradients(const Backward& f, const Tile<T, V, kNhwc>& tile,
                                               const Affines<T, V, kNhwc>& affines, const Sources<T>& source,
                                               const PositionTerms* terms, float2* scratch, float2* sums, bool first) {
  constexpr int kChannels = Tile<T, V, kNhwc>::kChannels;
  const int thread = static_cast<int>(threadIdx.x);
  with_activation<T, (V > 1)>(f.activation, [&](auto activation) {
    tile.for_each_line([&](int line, bool active) {
      float2 sum[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] = {0.0f, 0.0f};
      if (active) {
        ChannelAffine k[kChannels];
#pragma unroll
        for (int i = 0; i < kChannels; ++i) k[i] = affines(line * kChannels + i);
        T* to = static_cast<T*>(f.dx) + tile.start + line * tile.strides.line;
        const auto use = [&](int along, const Vector<T, V>& x, const Vector<T, V>& dy) {
          Vector<T, V> result;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int c = kNhwc ? i : 0;
            const PositionTerms& term = terms[kNhwc ? along : along * V + i];
            const float xhat = to_float(x[i]) * term.rstd;
            const float dt = to_float(dy[i]) * activation.slope(fmaf(xhat, k[c].multiplier, k[c].offset));
            sum[c] = {sum[c].x + dt, fmaf(dt, xhat, sum[c].y)};
            result[i] = from_float<T>(term.factor * fmaf(-xhat, term.mean, dt * k[c].multiplier));
          }
          if (f.dx) store<V>(to + along * tile.strides.along, result);
        };
        tile.template for_each_vector<1>(source.strides, line, use, source.x, source.dy);
      }
      if constexpr (kNhwc) {
        float2* row = tile.along_step == 1 ? sums : scratch + thread / f.team * tile.channels;
        if (active && thread / f.team < tile.along_step) {
#pragma unroll
          for (int i = 0; i < kChannels; ++i) add_to(row + line * kChannels + i, sum[i], first || row != sums);
        }
      } else {
        for (int mask = f.team / 2; mask > 0; mask /= 2) sum[0] = Sum2()(sum[0], shuffle_xor(sum[0], mask));
        if (active && thread % f.team == 0) add_to(sums + line, sum[0], first);
      }
    });
  });
  if (!kNhwc || tile.along_step == 1) return;
  __syncthreads();
  for (int c = thread; c < tile.channels; c += block_threads()) {
    float2 sum = scratch[c];
    for (int row = 1; row < tile.along_step; ++row) sum = Sum2()(sum, scratch[row * tile.channels + c]);
    add_to(sums + c, sum, first);
  }
}

// Grid: f.blocks for each sample.
template <typename T, int V, bool kNhwc>
__global__ void __launch_bounds__(kMaxThreads, 1) backward(Backward f) {
  const unsigned sample = blockIdx.x / f.blocks;
  const unsigned first = sample * f.chunks + blockIdx.x % f.blocks * f.tiles;
  const unsigned last = min(first + f.tiles, (sample + 1) * f.chunks);
  unsigned char* shared = dynamic_shared();
  T* copy_x = reinterpret_cast<T*>(shared);
  T* copy_dy = reinterpret_cast<T*>(shared += f.tile_bytes);
  ChannelAffine* affine = reinterpret_cast<ChannelAffine*>(shared += f.tile_bytes);
  float2* sums = reinterpret_cast<float2*>(shared += f.affine_bytes);
  unsigned char* scratch = shared += f.sums_bytes;
  PositionTerms* terms = reinterpret_cast<PositionTerms*>(shared += f.scratch_bytes);
  float2* to_sums = f.block_sums + static_cast<int64_t>(blockIdx.x) * f.channels;
  if (!f.sums_bytes) sums = to_sums;

  const T* x = static_cast<const T*>(f.x);
  const T* dy = static_cast<const T*>(f.dy);
  const Affines<T, V, kNhwc> affines(f, Tile<T, V, kNhwc>(f, first), affine);
  for (unsigned index = first; index < last; ++index) {
    const Tile<T, V, kNhwc> tile(f, index);
    Sources<T> source{x + tile.start, dy + tile.start, tile.strides};
    if (f.tile_bytes) {
      copy_tile(tile, x, copy_x);
      copy_tile(tile, dy, copy_dy);
      copy_async_commit();
      copy_async_wait<0>();
      source = {copy_x, copy_dy, tile.packed};
    }
    __syncthreads();
    tile_terms(f, tile, affines, source, reinterpret_cast<float*>(scratch), terms);
    tile_gradients(f, tile, affines, source, terms, reinterpret_cast<float2*>(scratch), sums, index == first);
    __syncthreads();  // the next tile comes to the same place
  }
  if (!f.sums_bytes) return;
  for (int c = static_cast<int>(threadIdx.x); c < f.channels; c += block_threads()) to_sums[c] = sums[c];
}

constexpr int kJoinRows = 16;

// Grid: a block for every 32 channels of a sample; block: 32 channels by kJoinRows of the blocks that left sums.
static __global__ void __launch_bounds__(kWarpSize* kJoinRows) backward_join(Backward f) {
  SHARED(rows, float2[kJoinRows][kWarpSize]);
  const int parts = ceil_div(f.channels, kWarpSize);
  const int64_t sample = blockIdx.x / parts;
  const int c = static_cast<int>(blockIdx.x % parts) * kWarpSize + static_cast<int>(threadIdx.x);
  float2 sum{0.0f, 0.0f};
  if (c < f.channels) {
    const float2* from = f.block_sums + sample * f.blocks * f.channels + c;
    for (int k = static_cast<int>(threadIdx.y); k < f.blocks; k += kJoinRows)
      sum = Sum2()(sum, from[static_cast<int64_t>(k) * f.channels]);
  }
  rows[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= f.channels) return;
  for (int row = 1; row < kJoinRows; ++row) sum = Sum2()(sum, rows[row][threadIdx.x]);
  f.sums[sample * f.channels + c] = sum;
}

}  // namespace imagen_fast::channel_rms_norm_act::device
