// The part of a tensor that one block of a norm works on, and how its threads walk over it.
//
// A slice is what shares statistics in one sample: in NCHW one group, in NHWC as many groups together as make accesses
// of at least 32 bytes (a sector of memory). A slice's positions are cut into chunks; a tile is one chunk of one slice.
// (A norm without groups has one, of all channels.)
//
// Both layouts are walked the same way: by lines on which the channels stay the same, so that what belongs to a channel
// is loaded once a line and summed in registers.
//
//            line                          along the line                channels of a line
//   NCHW     a channel                     vectors of V positions        1
//   NHWC     a vector of V channels        positions                     V
#pragma once

#include "activation_codes.h"
#include "cuda.cuh"
#include "cuda_parameters.cuh"

namespace imagen_fast {

constexpr int kMaxThreads = 512;
constexpr int kMaxGroups = 16;          // in a slice
constexpr int kAffinesInShared = 2048;  // channels; beyond, their coefficients are formed where they are used

// Made by the plan.h of an op
struct TiledNorm {
  int channels;
  int64_t positions;
  int groups;
  int channels_per_group;
  int groups_together;  // in a slice; the last slice of a sample may have fewer
  int slices;           // of a sample
  int chunks;           // of a slice
  int64_t chunk;        // positions; a multiple of V in NCHW
  int team;             // threads abreast: on a line in NCHW, on the lines at a position in NHWC
  int tile_bytes;       // of shared memory, for a tile of x (0: it stays in global memory)
  int affine_bytes;     // for the coefficients of a slice's channels
  Activation activation;
  Parameters parameters;
};

struct Sum2 {
  __device__ __forceinline__ float2 operator()(float2 a, float2 b) const { return {a.x + b.x, a.y + b.y}; }
};

// Elements in memory: `offset` of a line's vector
struct Strides {
  int64_t line;
  int64_t along;
};

template <typename T, int V, bool kNhwc>
struct Tile {
  static constexpr int kChannels = kNhwc ? V : 1;  // of a line

  int64_t sample;
  int slice;
  int chunk;
  int first_group;
  int groups;
  int first_channel;
  int channels;
  int64_t chunk_positions;
  int64_t start;    // element of x where the tile begins
  Strides strides;  // in x
  Strides packed;   // in shared memory, without gaps
  int lines;
  int length;  // vectors of a line

  // This thread's share
  int first_line;
  int line_step;
  int first_along;
  int along_step;

  // Tiles are counted by chunk, then slice, then sample.
  __device__ __forceinline__ Tile(const TiledNorm& p, unsigned index) {
    chunk = static_cast<int>(index % p.chunks);
    slice = static_cast<int>(index / p.chunks % p.slices);
    sample = index / p.chunks / p.slices;
    first_group = slice * p.groups_together;
    groups = min(p.groups_together, p.groups - first_group);
    first_channel = first_group * p.channels_per_group;
    channels = groups * p.channels_per_group;
    const int64_t first_position = chunk * p.chunk;
    const int64_t left = p.positions - first_position;
    chunk_positions = left < 0 ? 0 : left < p.chunk ? left : p.chunk;

    const int thread = static_cast<int>(threadIdx.x);
    const int teams = static_cast<int>(blockDim.x) / p.team;
    if constexpr (kNhwc) {
      start = (sample * p.positions + first_position) * p.channels + first_channel;
      strides = {V, p.channels};
      packed = {V, channels};
      lines = channels / V;
      length = static_cast<int>(chunk_positions);
      first_line = thread % p.team;
      line_step = p.team;
      first_along = thread / p.team;
      along_step = teams;
      if (first_along >= teams) first_along = length;  // one of the threads left over
    } else {
      start = (sample * p.channels + first_channel) * p.positions + first_position;
      strides = {p.positions, V};
      packed = {chunk_positions, V};
      lines = channels;
      length = static_cast<int>(chunk_positions / V);
      first_line = thread / p.team;
      line_step = teams;
      first_along = thread % p.team;
      along_step = p.team;
    }
  }

  // How many values of a group are in the tile
  __device__ __forceinline__ float count(const TiledNorm& p) const {
    return static_cast<float>(chunk_positions) * static_cast<float>(p.channels_per_group);
  }

  // Calls work(line, active) equally often in every thread; not active: beyond the last line.
  template <typename Work>
  __device__ __forceinline__ void for_each_line(Work work) const {
    for (int base = 0; base < lines; base += line_step) work(base + first_line, base + first_line < lines);
  }

  // Calls use(offset along the line, vector of each source) for this thread's vectors of a line; loads come in batches,
  // so that several are on their way at a time.
  template <int kBatch, typename Use, typename... Source>
  __device__ __forceinline__ void for_each_vector(const Strides& s, int line, Use use, const Source*... source) const {
    const int64_t at = line * s.line;
    int i = first_along;
    if constexpr (kBatch > 1) {
      for (; i + (kBatch - 1) * along_step < length; i += kBatch * along_step) {
        load_and_use<kBatch>(s, at, i, use, source...);
      }
    }
    for (; i < length; i += along_step) load_and_use<1>(s, at, i, use, source...);
  }

  // The group within the slice that a line's channel belongs to
  __device__ __forceinline__ int group_of(const TiledNorm& p, int line, int i) const {
    return groups == 1 ? 0 : (line * kChannels + i) / p.channels_per_group;
  }

 private:
  template <int N>
  struct Batch {
    Vector<T, V> vectors[N];
  };

  template <int N>
  __device__ __forceinline__ Batch<N> load_batch(const T* source, int64_t at, int i, int64_t along) const {
    Batch<N> batch;
#pragma unroll
    for (int k = 0; k < N; ++k) batch.vectors[k] = load<V>(source + at + (i + k * along_step) * along);
    return batch;
  }

  template <int N, typename Use>
  __device__ __forceinline__ void load_and_use(const Strides& s, int64_t at, int i, Use& use, const T* a) const {
    const Batch<N> x = load_batch<N>(a, at, i, s.along);
#pragma unroll
    for (int k = 0; k < N; ++k) use((i + k * along_step), x.vectors[k]);
  }

  template <int N, typename Use>
  __device__ __forceinline__ void load_and_use(const Strides& s, int64_t at, int i, Use& use, const T* a,
                                               const T* b) const {
    const Batch<N> x = load_batch<N>(a, at, i, s.along);
    const Batch<N> y = load_batch<N>(b, at, i, s.along);
#pragma unroll
    for (int k = 0; k < N; ++k) use((i + k * along_step), x.vectors[k], y.vectors[k]);
  }
};

// Start copying a tile to shared memory. Each thread copies the vectors that it will work on itself, so that what it
// has to wait for are its own copies (copy_async_wait), and no barrier.
template <typename T, int V, bool kNhwc>
__device__ __forceinline__ void copy_tile(const Tile<T, V, kNhwc>& tile, const T* x, T* shared) {
  x += tile.start;
  tile.for_each_line([&](int line, bool active) {
    if (!active) return;
    for (int i = tile.first_along; i < tile.length; i += tile.along_step) {
      const T* source = x + line * tile.strides.line + i * tile.strides.along;
      T* target = shared + line * tile.packed.line + i * tile.packed.along;
      if constexpr (sizeof(T) * V == 16) {
        copy_async_16(target, source);
      } else {
        store<V>(target, load<V>(source));
      }
    }
  });
}

// The coefficients of a slice's channels: from shared memory, where they fit.
template <typename T, int V, bool kNhwc>
class Affines {
 public:
  // A barrier must come before they are used.
  __device__ __forceinline__ Affines(const TiledNorm& p, const Tile<T, V, kNhwc>& tile, ChannelAffine* shared)
      : p_(p), sample_(tile.sample), first_channel_(tile.first_channel), shared_(p.affine_bytes ? shared : nullptr) {
    if (!shared_) return;
    for (int c = static_cast<int>(threadIdx.x); c < tile.channels; c += static_cast<int>(blockDim.x)) {
      shared_[c] = channel_affine(p_.parameters, sample_, first_channel_ + c);
    }
  }

  // Of channel `c` of the slice
  __device__ __forceinline__ ChannelAffine operator()(int c) const {
    return shared_ ? shared_[c] : channel_affine(p_.parameters, sample_, first_channel_ + c);
  }

 private:
  const TiledNorm& p_;
  int64_t sample_;
  int first_channel_;
  ChannelAffine* shared_;
};

}  // namespace imagen_fast
