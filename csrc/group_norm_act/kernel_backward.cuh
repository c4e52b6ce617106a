// The backward pass of group_norm_act, which recomputes t = xhat * m + offset, m = weight * (1 + scale), from x. With
// dt = dy * activation'(t), and for every (sample, channel) the sums over positions
//
//     S = sum dt        T = sum dt * xhat
//
// of which the gradients of the parameters are made (see imagen_fast/ops/group_norm_act.py), and for every group of n
// values the sums over its channels A = sum m S / n, B = sum m T / n:
//
//     dx = rstd * (m dt - A - xhat B)
//
//   resident    One block, or a cluster of up to 8, per slice; x and dy stay in shared memory and are read once.
//   split       A grid over all chunks of all slices: `backward_sums` leaves each chunk's S and T, `backward_join` adds
//               them in order, `backward_apply` gives dx, from the last chunk to the first.
//
// Both leave S and T to `parameter_gradients`. All sums have one order: there are no float atomics.
#pragma once

#include "../common/cuda_activations.cuh"
#include "kernel_forward.cuh"

namespace imagen_fast::group_norm_act::device {

struct Backward : TiledNorm {
  const void* dy;
  const void* x;
  const float* mean;  // (batch, groups)
  const float* rstd;
  void* dx;            // null if it is not asked for
  float2* sums;        // (batch, channels): S and T
  float2* chunk_sums;  // (batch, chunks, channels): of each chunk; for the split way
  float2* group_sums;  // (batch, groups): A and B; for the split way
  int sums_bytes;      // of shared memory, for S and T of a slice's channels; for the resident way
};

// What a line's channels have in common
template <int kChannels>
struct LineCoefficients {
  float mean[kChannels], rstd[kChannels], multiplier[kChannels], offset[kChannels];

  template <typename T, int V, bool kNhwc>
  __device__ __forceinline__ LineCoefficients(const Backward& f, const Tile<T, V, kNhwc>& tile,
                                              const Affines<T, V, kNhwc>& affines, int line) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int64_t group = tile.sample * f.groups + tile.first_group + tile.group_of(f, line, i);
      const ChannelAffine affine = affines(line * kChannels + i);
      mean[i] = f.mean[group];
      rstd[i] = f.rstd[group];
      multiplier[i] = affine.multiplier;
      offset[i] = affine.offset;
    }
  }
};

// Where a tile's x and dy are: in shared memory, or in global
template <typename T>
struct Sources {
  const T* x;
  const T* dy;
  Strides strides;
};

// S and T of each of a tile's channels, into sums[channel of the slice], for all threads to see. `scratch` has room for
// one float2 per thread and channel of a line.
template <int kBatch, typename T, int V, bool kNhwc>
__device__ __forceinline__ void tile_sums(const Backward& f, const Tile<T, V, kNhwc>& tile,
                                          const Affines<T, V, kNhwc>& affines, const Sources<T>& source,
                                          float2* scratch, float2* sums) {
  constexpr int kChannels = Tile<T, V, kNhwc>::kChannels;
  const int thread = static_cast<int>(threadIdx.x);
  const int warps_of_team = ceil_div(f.team, kWarpSize);
  // Along a line in NCHW: the warps of its team; in NHWC: the rows of threads
  const int parts = kNhwc ? tile.along_step : warps_of_team;
  float2* const to = parts == 1 ? sums : scratch;
  with_activation<T, (V > 1)>(f.activation, [&](auto activation) {
    tile.for_each_line([&](int line, bool active) {
      float2 sum[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] = {0.0f, 0.0f};
      if (active) {
        const LineCoefficients<kChannels> k(f, tile, affines, line);
        const auto add = [&](int, const Vector<T, V>& x, const Vector<T, V>& dy) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int c = kNhwc ? i : 0;
            const float xhat = (to_float(x[i]) - k.mean[c]) * k.rstd[c];
            const float dt = to_float(dy[i]) * activation.slope(fmaf(xhat, k.multiplier[c], k.offset[c]));
            sum[c].x += dt;
            sum[c].y = fmaf(dt, xhat, sum[c].y);
          }
        };
        tile.template for_each_vector<kBatch>(source.strides, line, add, source.x, source.dy);
      }
      if constexpr (kNhwc) {
        const int row = thread / f.team;
        if (active && row < parts) {
#pragma unroll
          for (int i = 0; i < kChannels; ++i) to[row * tile.channels + line * kChannels + i] = sum[i];
        }
      } else {
        for (int mask = min(f.team, kWarpSize) / 2; mask > 0; mask /= 2)
          sum[0] = Sum2()(sum[0], shuffle_xor(sum[0], mask));
        if (active && thread % min(f.team, kWarpSize) == 0) to[line * parts + thread % f.team / kWarpSize] = sum[0];
      }
    });
  });
  __syncthreads();
  if (parts == 1) return;
  for (int c = thread; c < tile.channels; c += block_threads()) {
    float2 sum{0.0f, 0.0f};
    for (int part = 0; part < parts; ++part) {
      sum = Sum2()(sum, kNhwc ? scratch[part * tile.channels + c] : scratch[c * parts + part]);
    }
    sums[c] = sum;
  }
  __syncthreads();
}

// A and B from S and T of a group's channels, by the lanes of a warp
template <typename Sums, typename Multiplier>
__device__ __forceinline__ float2 group_sums(const TiledNorm& p, Sums sums, Multiplier multiplier) {
  float2 total{0.0f, 0.0f};
  for (int c = lane(); c < p.channels_per_group; c += kWarpSize) {
    const float2 sum = sums(c);
    const float m = multiplier(c);
    total = {fmaf(m, sum.x, total.x), fmaf(m, sum.y, total.y)};
  }
  total = warp_reduce(total, Sum2());
  const float count = static_cast<float>(p.positions) * static_cast<float>(p.channels_per_group);
  return {total.x / count, total.y / count};
}

// dx of a tile; `groups` has A and B of its groups.
template <typename T, int V, bool kNhwc>
__device__ __forceinline__ void tile_dx(const Backward& f, const Tile<T, V, kNhwc>& tile,
                                        const Affines<T, V, kNhwc>& affines, const Sources<T>& source,
                                        const float2* groups) {
  constexpr int kChannels = Tile<T, V, kNhwc>::kChannels;
  T* dx = static_cast<T*>(f.dx) + tile.start;
  with_activation<T, (V > 1)>(f.activation, [&](auto activation) {
    tile.for_each_line([&](int line, bool active) {
      if (!active) return;
      const LineCoefficients<kChannels> k(f, tile, affines, line);
      float2 group[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) group[i] = groups[tile.group_of(f, line, i)];
      T* to = dx + line * tile.strides.line;
      const auto use = [&](int along, const Vector<T, V>& x, const Vector<T, V>& dy) {
        Vector<T, V> result;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const int c = kNhwc ? i : 0;
          const float xhat = (to_float(x[i]) - k.mean[c]) * k.rstd[c];
          const float dt = to_float(dy[i]) * activation.slope(fmaf(xhat, k.multiplier[c], k.offset[c]));
          const float inner = fmaf(-xhat, group[c].y, fmaf(dt, k.multiplier[c], -group[c].x));
          result[i] = from_float<T>(k.rstd[c] * inner);
        }
        store<V>(to + along * tile.strides.along, result);
      };
      tile.template for_each_vector<1>(source.strides, line, use, source.x, source.dy);
    });
  });
}

// Grid: a block per tile. All chunks of a slice form a cluster.
template <typename T, int V, bool kNhwc>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_resident(Backward f) {
  const Tile<T, V, kNhwc> tile(f, blockIdx.x);
  unsigned char* shared = dynamic_shared();
  T* x = reinterpret_cast<T*>(shared);
  T* dy = reinterpret_cast<T*>(shared += f.tile_bytes);
  ChannelAffine* affine = reinterpret_cast<ChannelAffine*>(shared += f.tile_bytes);
  float2* sums = reinterpret_cast<float2*>(shared += f.affine_bytes);
  float2* all_sums = reinterpret_cast<float2*>(shared += f.sums_bytes);
  float2* scratch = reinterpret_cast<float2*>(shared += f.sums_bytes);
  SHARED(groups, float2[kMaxGroups]);

  copy_tile(tile, static_cast<const T*>(f.x), x);
  copy_tile(tile, static_cast<const T*>(f.dy), dy);
  copy_async_commit();
  const Affines<T, V, kNhwc> affines(f, tile, affine);
  copy_async_wait<0>();
  __syncthreads();
  const Sources<T> source{x, dy, tile.packed};
  tile_sums<kFromShared>(f, tile, affines, source, scratch, sums);

  if (f.chunks > 1) {
    cluster_sync();
    for (int c = static_cast<int>(threadIdx.x); c < tile.channels; c += block_threads()) {
      float2 sum{0.0f, 0.0f};
      for (int rank = 0; rank < f.chunks; ++rank) {
        sum = Sum2()(sum, map_shared_rank(sums, static_cast<unsigned>(rank))[c]);
      }
      all_sums[c] = sum;
    }
    cluster_sync();  // no block ends while another reads its sums
    sums = all_sums;
  }
  if (tile.chunk == 0) {
    float2* to = f.sums + tile.sample * f.channels + tile.first_channel;
    for (int c = static_cast<int>(threadIdx.x); c < tile.channels; c += block_threads()) to[c] = sums[c];
  }
  if (!f.dx) return;
  const int warps = block_threads() / kWarpSize;
  for (int group = warp_rank(); group < tile.groups; group += warps) {
    const int first = group * f.channels_per_group;
    const float2 total =
        group_sums(f, [&](int c) { return sums[first + c]; }, [&](int c) { return affines(first + c).multiplier; });
    if (lane() == 0) groups[group] = total;
  }
  __syncthreads();
  tile_dx(f, tile, affines, source, groups);
}

// Grid: a block per tile.
template <typename T, int V, bool kNhwc>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_sums(Backward f) {
  const Tile<T, V, kNhwc> tile(f, blockIdx.x);
  float2* scratch = reinterpret_cast<float2*>(dynamic_shared() + f.affine_bytes);
  const Affines<T, V, kNhwc> affines(f, tile, dynamic_shared<ChannelAffine>());
  __syncthreads();
  const Sources<T> source{static_cast<const T*>(f.x) + tile.start, static_cast<const T*>(f.dy) + tile.start,
                          tile.strides};
  tile_sums<kNhwc ? 1 : 2>(f, tile, affines, source, scratch,
                           f.chunk_sums + (tile.sample * f.chunks + tile.chunk) * f.channels + tile.first_channel);
}

// Grid: a block per (sample, group).
__global__ void __launch_bounds__(kMaxThreads, 1) backward_join(Backward f) {
  const int64_t sample = blockIdx.x / f.groups;
  const int first_channel = static_cast<int>(blockIdx.x % f.groups) * f.channels_per_group;
  float2* sums = f.sums + sample * f.channels + first_channel;
  const float2* chunks = f.chunk_sums + sample * f.chunks * f.channels + first_channel;
  const int warps = block_threads() / kWarpSize;
  for (int c = warp_rank(); c < f.channels_per_group; c += warps) {
    float2 sum{0.0f, 0.0f};
    for (int k = lane(); k < f.chunks; k += kWarpSize)
      sum = Sum2()(sum, chunks[static_cast<int64_t>(k) * f.channels + c]);
    sum = warp_reduce(sum, Sum2());
    if (lane() == 0) sums[c] = sum;
  }
  __syncthreads();
  if (warp_rank() != 0) return;
  const float2 total = group_sums(
      f, [&](int c) { return sums[c]; },
      [&](int c) { return channel_affine(f.parameters, sample, first_channel + c).multiplier; });
  if (lane() == 0) f.group_sums[blockIdx.x] = total;
}

// Grid: a block per tile, the last tile first.
template <typename T, int V, bool kNhwc>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_apply(Backward f) {
  const Tile<T, V, kNhwc> tile(f, gridDim.x - 1 - blockIdx.x);
  const Affines<T, V, kNhwc> affines(f, tile, dynamic_shared<ChannelAffine>());
  __syncthreads();
  const Sources<T> source{static_cast<const T*>(f.x) + tile.start, static_cast<const T*>(f.dy) + tile.start,
                          tile.strides};
  tile_dx(f, tile, affines, source, f.group_sums + tile.sample * f.groups + tile.first_group);
}

}  // namespace imagen_fast::group_norm_act::device
