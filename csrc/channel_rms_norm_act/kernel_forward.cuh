// The forward pass of channel_rms_norm_act. A block has a tile: some positions of a sample with all their channels. It
// stays in shared memory where it fits, so that x is read once; else it is read twice.
//
// The norms are taken along the channels, NHWC by a part of a warp for each position, NCHW by all threads of a column;
// then the tile is walked as in ../common/cuda_norm_tile.cuh, by lines that have their channels in common.
#pragma once

#include "../common/cuda_activations.cuh"
#include "../common/cuda_norm_tile.cuh"

namespace imagen_fast::channel_rms_norm_act::device {

// Tiles are what TiledNorm calls chunks, of one group of all channels.
struct Positions : TiledNorm {
  int lanes;          // of a warp for one position in NHWC, a power of two
  int scratch_bytes;  // of shared memory
};

struct Forward : Positions {
  const void* x;
  void* y;
  float* rstd;  // (batch, positions)
};

// sqrt(C) / max(norm, 1e-12)
__device__ __forceinline__ float inverse_rms(float norm, int channels) {
  const float root = sqrtf(static_cast<float>(channels));
  return root / (norm < 1e-12f ? 1e-12f : norm);  // a NaN stays one
}

// Where a tile's x and dy are: in shared memory, or in global
template <typename T>
struct Sources {
  const T* x;
  const T* dy;
  Strides strides;
};

// For every position of the tile finish(position, sum over the channels of term(channel, position, x, dy)), once; a
// barrier must come before what finish has written is read by other threads. `scratch` has room for a float per warp
// and position in NCHW.
template <typename T, int V, bool kNhwc, typename Term, typename Finish>
__device__ __forceinline__ void sum_over_channels(const Positions& f, const Tile<T, V, kNhwc>& tile,
                                                  const Sources<T>& source, float* scratch, Term term, Finish finish) {
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kNhwc) {
    const int together = block_threads() / f.lanes;
    const int first_line = thread % f.lanes;
    for (int base = 0; base < tile.length; base += together) {
      const int position = base + thread / f.lanes;
      float sum = 0.0f;
      if (position < tile.length) {
        for (int line = first_line; line < tile.lines; line += f.lanes) {
          const int64_t at = line * source.strides.line + position * source.strides.along;
          const Vector<T, V> x = load<V>(source.x + at);
          const Vector<T, V> dy = load<V>(source.dy + at);
#pragma unroll
          for (int i = 0; i < V; ++i) sum += term(line * V + i, position, to_float(x[i]), to_float(dy[i]));
        }
      }
      for (int mask = f.lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (position < tile.length && first_line == 0) finish(position, sum);
    }
  } else {
    // A thread has one vector of each of its channels: the team is as wide as the tile.
    const int positions = tile.length * V;
    float sums[V];
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] = 0.0f;
    if (tile.first_along < tile.length) {
      const int64_t along = tile.first_along * source.strides.along;
      for (int line = tile.first_line; line < tile.lines; line += tile.line_step) {
        const Vector<T, V> x = load<V>(source.x + line * source.strides.line + along);
        const Vector<T, V> dy = load<V>(source.dy + line * source.strides.line + along);
#pragma unroll
        for (int i = 0; i < V; ++i) sums[i] += term(line, tile.first_along * V + i, to_float(x[i]), to_float(dy[i]));
      }
    }
    for (int mask = f.team; mask < kWarpSize; mask *= 2) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i] += shuffle_xor(sums[i], mask);
    }
    if (lane() < f.team && tile.first_along < tile.length) {
#pragma unroll
      for (int i = 0; i < V; ++i) scratch[warp_rank() * positions + tile.first_along * V + i] = sums[i];
    }
    __syncthreads();
    for (int position = thread; position < positions; position += block_threads()) {
      float sum = 0.0f;
      for (int warp = 0; warp < block_threads() / kWarpSize; ++warp) sum += scratch[warp * positions + position];
      finish(position, sum);
    }
  }
}

// The same for squares that overflow: from values times 2^-96, by one thread
template <typename T, int V, bool kNhwc>
__device__ inline float inverse_rms_of_large(const Tile<T, V, kNhwc>& tile, const T* x, Strides strides, int position) {
  constexpr float kSmall = 1.262177448e-29f;
  const int64_t along = kNhwc ? position * strides.along : position;
  float sum = 0.0f;
  for (int c = 0; c < tile.channels; ++c) {
    const float value = to_float(x[(kNhwc ? c : c * strides.line) + along]) * kSmall;
    sum = fmaf(value, value, sum);
  }
  return inverse_rms(sqrtf(sum), tile.channels) * kSmall;
}

// Grid: a block per tile.
template <typename T, int V, bool kNhwc>
__global__ void __launch_bounds__(kMaxThreads, 1) forward(Forward f) {
  const Tile<T, V, kNhwc> tile(f, blockIdx.x);
  unsigned char* shared = dynamic_shared();
  T* copy = reinterpret_cast<T*>(shared);
  ChannelAffine* affine = reinterpret_cast<ChannelAffine*>(shared += f.tile_bytes);
  float* scratch = reinterpret_cast<float*>(shared += f.affine_bytes);
  float* rstd = reinterpret_cast<float*>(shared += f.scratch_bytes);  // of each position

  const T* x = static_cast<const T*>(f.x);
  Sources<T> source{x + tile.start, x + tile.start, tile.strides};
  if (f.tile_bytes) {
    copy_tile(tile, x, copy);
    copy_async_commit();
    source = {copy, copy, tile.packed};
  }
  const Affines<T, V, kNhwc> affines(f, tile, affine);
  copy_async_wait<0>();
  __syncthreads();

  float* to_rstd = f.rstd + tile.sample * f.positions + tile.chunk * f.chunk;
  sum_over_channels(
      f, tile, source, scratch, [](int, int, float value, float) { return value * value; },
      [&](int position, float sum) {
        const float value = sum > 3.402823466e38f ? inverse_rms_of_large(tile, source.x, source.strides, position)
                                                  : inverse_rms(sqrtf(sum), tile.channels);
        rstd[position] = value;
        to_rstd[position] = value;
      });
  __syncthreads();

  with_activation<T, (V > 1)>(f.activation, [&](auto activation) {
    tile.for_each_line([&](int line, bool active) {
      if (!active) return;
      ChannelAffine k[Tile<T, V, kNhwc>::kChannels];
#pragma unroll
      for (int i = 0; i < Tile<T, V, kNhwc>::kChannels; ++i) k[i] = affines(line * Tile<T, V, kNhwc>::kChannels + i);
      T* to = static_cast<T*>(f.y) + tile.start + line * tile.strides.line;
      const auto use = [&](int along, const Vector<T, V>& v) {
        Vector<T, V> result;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float xhat = to_float(v[i]) * rstd[kNhwc ? along : along * V + i];
          const ChannelAffine& affine = k[kNhwc ? i : 0];
          result[i] = from_float<T>(activation.value(fmaf(xhat, affine.multiplier, affine.offset)));
        }
        store<V>(to + along * tile.strides.along, result);
      };
      tile.template for_each_vector<1>(source.strides, line, use, source.x);
    });
  });
}

}  // namespace imagen_fast::channel_rms_norm_act::device
