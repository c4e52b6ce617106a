// The forward pass of group_norm_act. Statistics are exact: the mean first, then the sum of squared deviations from it.
//
//   resident    One block, or a cluster of up to 8, per slice; its values stay in shared memory and are read once.
//   split       A grid over all chunks of all slices: `forward_moments` leaves each chunk's mean and deviations,
//               `forward_apply` joins them in order, and walks the chunks in reverse, since the last ones read are
//               still in the second-level cache.
#pragma once

#include "../common/cuda_activations.cuh"
#include "../common/cuda_norm_tile.cuh"

namespace imagen_fast::group_norm_act::device {

struct Forward : TiledNorm {
  float eps;
  const void* x;
  void* y;
  float* mean;            // (batch, groups)
  float* rstd;            // (batch, groups)
  float4* chunk_moments;  // (batch, groups, chunks): mean, rest and deviations of each; for the split way
};

// Loads that a thread has on their way at a time: by where they come from
constexpr int kFromShared = 1;
constexpr int kFromGlobal = 4;

// Of `count` values: their mean, as a float and what is missing to it, and the sum of their squared deviations from it.
// (With mean 1000 and deviation 1, rounding the mean once for each chunk shows in the results.)
struct Moments {
  float count;
  float mean;
  float rest;
  float deviations;
};

// The mean moved by `shift`
__device__ __forceinline__ Moments moved(const Moments& m, float shift) {
  const float mean = m.mean + shift;
  return {m.count, mean, m.rest + (shift - (mean - m.mean)), m.deviations};
}

// Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979
struct Join {
  __device__ __forceinline__ Moments operator()(const Moments& a, const Moments& b) const {
    if (b.count == 0.0f) return a;
    if (a.count == 0.0f) return b;
    const float count = a.count + b.count;
    const float share = b.count / count;
    const float difference = (b.mean - a.mean) + (b.rest - a.rest);
    Moments joined = moved(a, difference * share);
    joined.count = count;
    joined.deviations = a.deviations + b.deviations + difference * difference * (a.count * share);
    return joined;
  }
};

struct Statistics {
  float mean;
  float rest;
  float rstd;
};

__device__ __forceinline__ Statistics statistics(const Moments& m, float eps) {
  const float variance = m.deviations / m.count;
  return {m.mean, m.rest, 1.0f / sqrtf(variance + eps)};
}

// Each group's sum over the block of `value(line, channel of the line)`, for slices of several groups: there is at most
// one line per thread.
template <typename T, int V, bool kNhwc>
__device__ __forceinline__ void sum_groups(const TiledNorm& p, const Tile<T, V, kNhwc>& tile, const float2* values,
                                           float2* scratch, float2* sums) {
  const int rows = tile.along_step;
  const int row = static_cast<int>(threadIdx.x) / p.team;
  if (tile.first_line < tile.lines && row < rows) {
#pragma unroll
    for (int i = 0; i < V; ++i) scratch[row * tile.channels + tile.first_line * V + i] = values[i];
  }
  __syncthreads();
  const int warps = block_threads() / kWarpSize;
  for (int group = warp_rank(); group < tile.groups; group += warps) {
    float2 sum{0.0f, 0.0f};
    for (int k = lane(); k < rows * p.channels_per_group; k += kWarpSize) {
      const int channel = group * p.channels_per_group + k % p.channels_per_group;
      sum = Sum2()(sum, scratch[k / p.channels_per_group * tile.channels + channel]);
    }
    sum = warp_reduce(sum, Sum2());
    if (lane() == 0) sums[group] = sum;
  }
  __syncthreads();
}

// The moments of a tile's groups, for all threads to see. `x` is the tile, in shared or in global memory.
// The second pass corrects the first one's mean by the mean of the deviations.
template <int kBatch, typename T, int V, bool kNhwc>
__device__ __forceinline__ void tile_moments(const TiledNorm& p, const Tile<T, V, kNhwc>& tile, const T* x,
                                             const Strides& strides, float2* scratch, Moments* moments) {
  const float count = tile.count(p);
  if (tile.groups == 1) {
    float sum = 0.0f;
    tile.for_each_line([&](int line, bool active) {
      if (!active) return;
      const auto add = [&](int, const Vector<T, V>& v) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum += to_float(v[i]);
      };
      tile.template for_each_vector<kBatch>(strides, line, add, x);
    });
    const float mean = block_sum(sum) / count;
    float2 deviations{0.0f, 0.0f};
    tile.for_each_line([&](int line, bool active) {
      if (!active) return;
      const auto add = [&](int, const Vector<T, V>& v) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float d = to_float(v[i]) - mean;
          deviations.x += d;
          deviations.y = fmaf(d, d, deviations.y);
        }
      };
      tile.template for_each_vector<kBatch>(strides, line, add, x);
    });
    deviations = block_reduce(deviations, Sum2(), float2{0.0f, 0.0f});
    if (threadIdx.x == 0) {
      const float correction = deviations.x / count;
      const float left = fmaf(-correction, deviations.x, deviations.y);
      moments[0] = moved({count, mean, 0.0f, left < 0.0f ? 0.0f : left}, correction);
    }
    __syncthreads();
    return;
  }
  if constexpr (kNhwc) {
    SHARED(sums, float2[kMaxGroups]);
    const int line = tile.first_line;
    float2 values[V];
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = {0.0f, 0.0f};
    if (line < tile.lines) {
      const auto add = [&](int, const Vector<T, V>& v) {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i].x += to_float(v[i]);
      };
      tile.template for_each_vector<kBatch>(strides, line, add, x);
    }
    sum_groups(p, tile, values, scratch, sums);
    float means[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      means[i] = line < tile.lines ? sums[tile.group_of(p, line, i)].x / count : 0.0f;
      values[i] = {0.0f, 0.0f};
    }
    const float group_mean = static_cast<int>(threadIdx.x) < tile.groups ? sums[threadIdx.x].x / count : 0.0f;
    __syncthreads();
    if (line < tile.lines) {
      const auto add = [&](int, const Vector<T, V>& v) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float d = to_float(v[i]) - means[i];
          values[i].x += d;
          values[i].y = fmaf(d, d, values[i].y);
        }
      };
      tile.template for_each_vector<kBatch>(strides, line, add, x);
    }
    sum_groups(p, tile, values, scratch, sums);
    if (static_cast<int>(threadIdx.x) < tile.groups) {
      const float2 sum = sums[threadIdx.x];
      const float correction = sum.x / count;
      const float left = fmaf(-correction, sum.x, sum.y);
      moments[threadIdx.x] = moved({count, group_mean, 0.0f, left < 0.0f ? 0.0f : left}, correction);
    }
    __syncthreads();
  }
}

// y of a tile. `x` is the tile, in shared or in global memory.
template <int kBatch, typename T, int V, bool kNhwc>
__device__ __forceinline__ void apply(const Forward& f, const Tile<T, V, kNhwc>& tile,
                                      const Affines<T, V, kNhwc>& affines, const Statistics* statistics, const T* x,
                                      const Strides& strides) {
  constexpr int kChannels = Tile<T, V, kNhwc>::kChannels;
  T* y = static_cast<T*>(f.y) + tile.start;
  with_activation<T, (V > 1)>(f.activation, [&](auto activation) {
    tile.for_each_line([&](int line, bool active) {
      if (!active) return;
      float mean[kChannels], multiplier[kChannels], offset[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const Statistics s = statistics[tile.group_of(f, line, i)];
        const ChannelAffine affine = affines(line * kChannels + i);
        mean[i] = s.mean;
        multiplier[i] = s.rstd * affine.multiplier;
        offset[i] = fmaf(-s.rest, multiplier[i], affine.offset);
      }
      T* to = y + line * tile.strides.line;
      const auto use = [&](int along, const Vector<T, V>& v) {
        Vector<T, V> result;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const int c = kNhwc ? i : 0;
          result[i] = from_float<T>(activation.value(fmaf(to_float(v[i]) - mean[c], multiplier[c], offset[c])));
        }
        store<V>(to + along * tile.strides.along, result);
      };
      tile.template for_each_vector<kBatch>(strides, line, use, x);
    });
  });
}

// The first block of a slice tells the statistics to the backward pass.
template <typename T, int V, bool kNhwc>
__device__ __forceinline__ void write_statistics(const Forward& f, const Tile<T, V, kNhwc>& tile,
                                                 const Statistics* statistics) {
  const int group = static_cast<int>(threadIdx.x);
  if (tile.chunk != 0 || group >= tile.groups) return;
  const int64_t at = tile.sample * f.groups + tile.first_group + group;
  f.mean[at] = statistics[group].mean;
  f.rstd[at] = statistics[group].rstd;
}

// Grid: a block per tile. All chunks of a slice form a cluster.
template <typename T, int V, bool kNhwc>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_resident(Forward f) {
  const Tile<T, V, kNhwc> tile(f, blockIdx.x);
  unsigned char* shared = dynamic_shared();
  T* x = reinterpret_cast<T*>(shared);
  SHARED(moments, Moments[kMaxGroups]);
  SHARED(stats, Statistics[kMaxGroups]);

  copy_tile(tile, static_cast<const T*>(f.x), x);
  copy_async_commit();
  const Affines<T, V, kNhwc> affines(f, tile, reinterpret_cast<ChannelAffine*>(shared + f.tile_bytes));
  copy_async_wait<0>();
  tile_moments<kFromShared>(f, tile, x, tile.packed, reinterpret_cast<float2*>(shared + f.tile_bytes + f.affine_bytes),
                            moments);

  const bool clustered = f.chunks > 1;
  if (clustered) cluster_sync();
  if (static_cast<int>(threadIdx.x) < tile.groups) {
    Moments all = moments[threadIdx.x];
    if (clustered) {
      all = map_shared_rank(&moments[0], 0)[threadIdx.x];
      for (int rank = 1; rank < f.chunks; ++rank) {
        all = Join()(all, map_shared_rank(&moments[0], static_cast<unsigned>(rank))[threadIdx.x]);
      }
    }
    stats[threadIdx.x] = statistics(all, f.eps);
  }
  if (clustered) cluster_sync();  // no block ends while another reads its moments
  __syncthreads();
  write_statistics(f, tile, stats);
  apply<kFromShared>(f, tile, affines, stats, x, tile.packed);
}

// Grid: a block per tile.
template <typename T, int V, bool kNhwc>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_moments(Forward f) {
  const Tile<T, V, kNhwc> tile(f, blockIdx.x);
  SHARED(moments, Moments[kMaxGroups]);
  float2* scratch = reinterpret_cast<float2*>(dynamic_shared() + f.affine_bytes);
  tile_moments<kFromGlobal>(f, tile, static_cast<const T*>(f.x) + tile.start, tile.strides, scratch, moments);
  const int group = static_cast<int>(threadIdx.x);
  if (group < tile.groups) {
    const int64_t at = tile.sample * f.groups + tile.first_group + group;
    f.chunk_moments[at * f.chunks + tile.chunk] = {moments[group].mean, moments[group].rest, moments[group].deviations,
                                                   0.0f};
  }
}

// Grid: a block per tile, the last tile first.
template <typename T, int V, bool kNhwc>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_apply(Forward f) {
  const Tile<T, V, kNhwc> tile(f, gridDim.x - 1 - blockIdx.x);
  SHARED(stats, Statistics[kMaxGroups]);
  const Affines<T, V, kNhwc> affines(f, tile, dynamic_shared<ChannelAffine>());
  const int warps = block_threads() / kWarpSize;
  for (int group = warp_rank(); group < tile.groups; group += warps) {
    const float4* chunks = f.chunk_moments + (tile.sample * f.groups + tile.first_group + group) * f.chunks;
    Moments all{0.0f, 0.0f, 0.0f, 0.0f};
    for (int k = lane(); k < f.chunks; k += kWarpSize) {
      const int64_t left = f.positions - k * f.chunk;
      const float count = static_cast<float>(left < f.chunk ? left : f.chunk) * f.channels_per_group;
      all = Join()(all, {count, chunks[k].x, chunks[k].y, chunks[k].z});
    }
    all = warp_reduce(all, Join());
    if (lane() == 0) stats[group] = statistics(all, f.eps);
  }
  __syncthreads();
  write_statistics(f, tile, stats);
  apply<2>(f, tile, affines, stats, static_cast<const T*>(f.x) + tile.start, tile.strides);
}

}  // namespace imagen_fast::group_norm_act::device
