// The exact quantile of magnitudes on a GPU, by radix selection: no sort, and no value leaves the device.
//
// Magnitudes of floats are ordered as their bits are, read as an integer of 31 bits: the key. Three passes over the
// keys find the key of a rank by its digits of 11, 10 and 10 bits: each counts, among the keys that begin with the
// digits known so far, how often each next digit occurs, and the sums of these counts say which of them has the rank.
// The last pass looks for the least key above those that it counts, too; so the key of the next rank, with which the
// quantile is interpolated, is exact as well.
//
// The keys stay where they are (shared memory, if there is room), and one block, a cluster or the whole grid count them
// together. Counts are integers, so that the order of additions does not matter.
#pragma once

#include "cuda.cuh"

namespace imagen_fast {

constexpr int kSelectThreads = 512;  // of a block that counts

// ---- Keys

constexpr uint32_t kNanKey = 0x7fffffffu;  // above that of infinity; of every NaN
constexpr uint32_t kNoKey = 0xffffffffu;

__device__ __forceinline__ uint32_t magnitude_key(float value) {
  const uint32_t magnitude = __float_as_uint(value) & 0x7fffffffu;
  return magnitude > 0x7f800000u ? kNanKey : magnitude;
}

// ---- Digits: of each pass, how many there are, which bits of a key they are, and where their counts begin

__host__ __device__ constexpr int digits_of(int pass) { return pass == 0 ? 2048 : 1024; }
__host__ __device__ constexpr int digit_shift(int pass) { return 20 - 10 * pass; }
__host__ __device__ constexpr int first_count(int pass) { return pass == 0 ? 0 : 1024 * (pass + 1); }
constexpr int kCounts = 4096;
constexpr int kNanDigit = 2047;  // of the first pass; no other key has it

using Count = unsigned long long;  // a sample may have more than 2^32 values

// ---- What is searched, see numpy.quantile: the value between ranks `rank` and `rank` + 1 at a distance of `weight`

struct QuantilePlace {
  Count rank;
  double weight;  // in [0, 1)
};

inline QuantilePlace quantile_place(double q, int64_t n) {
  const double place = q * static_cast<double>(n - 1);
  const Count rank = static_cast<Count>(place);
  return {rank, place - static_cast<double>(rank)};
}

// ---- Counting

// Who counts the keys of a sample
enum class Team : int { kBlock, kCluster, kGrid };

// The counts of a sample in global memory, for a grid
struct SampleCounts {
  Count count[kCounts];
  unsigned above;  // the least key above those of the last pass
  unsigned unused;
};

struct SelectorMemory {
  unsigned count[kCounts];
  unsigned above;
  Count warp_sums[kSelectThreads / kWarpSize];
  // What `find` says to all threads
  Count before;
  int digit;
  int next_digit;  // of the last pass
  bool has_nan;
};

// One selection: clear, then for each pass count all keys, close and find, then quantile, then leave. All threads of
// the team call everything but `count`.
class Selector {
 public:
  // `global` is for a grid; whoever begins has cleared it.
  __device__ __forceinline__ Selector(Team team, SelectorMemory& memory, SampleCounts* global,
                                      const QuantilePlace& place)
      : team_(team), memory_(memory), global_(global), place_(place), rank_(place.rank) {}

  __device__ __forceinline__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kCounts; i += kSelectThreads) memory_.count[i] = 0;
    if (threadIdx.x == 0) memory_.above = kNoKey;
    __syncthreads();
  }

  template <int pass>
  __device__ __forceinline__ void count(uint32_t key) {
    constexpr int kShift = digit_shift(pass);
    if constexpr (pass > 0) {
      const uint32_t before = key >> digit_shift(pass - 1);
      if (pass == 2 && before > prefix_) above_ = key < above_ ? key : above_;
      if (before != prefix_) return;
    }
    atomicAdd(&memory_.count[first_count(pass) + (key >> kShift) % digits_of(pass)], 1u);
  }

  // Of the first pass, where only NaN matters
  __device__ __forceinline__ void count_nan(uint32_t key) {
    if (key == kNanKey) atomicAdd(&memory_.count[kNanDigit], 1u);
  }

  // The pass is over: all blocks' counts come together.
  template <int pass>
  __device__ __forceinline__ void close() {
    if (team_ == Team::kGrid) {
      publish<pass>();
      grid_sync();
      return;
    }
    join_above<pass>();
    if (team_ == Team::kCluster) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }

  // This block's counts are added to those in global memory.
  template <int pass>
  __device__ __forceinline__ void publish() {
    join_above<pass>();
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < digits_of(pass); i += kSelectThreads) {
      const unsigned count = memory_.count[first_count(pass) + i];
      if (count) atomicAdd(&global_->count[first_count(pass) + i], static_cast<Count>(count));
    }
    if (pass == 2 && threadIdx.x == 0 && memory_.above != kNoKey) atomicMin(&global_->above, memory_.above);
  }

  // Whether any key is that of a NaN, after the first pass is closed
  __device__ __forceinline__ bool has_nan() const { return total<0>(kNanDigit) > 0; }

  // Which digit has the rank. Every thread of the block learns it.
  template <int pass>
  __device__ __forceinline__ void find() {
    constexpr int kEach = digits_of(pass) / kSelectThreads;
    const int first = static_cast<int>(threadIdx.x) * kEach;
    Count count[kEach], sum = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      count[k] = total<pass>(first + k);
      sum += count[k];
    }
    Count up_to = sum;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const Count other = __shfl_up_sync(kFullWarp, up_to, offset);
      if (lane() >= offset) up_to += other;
    }
    if (lane() == kWarpSize - 1) memory_.warp_sums[warp_rank()] = up_to;
    if (pass == 2 && threadIdx.x == 0) memory_.next_digit = digits_of(pass);
    __syncthreads();
    Count before = up_to - sum;
    for (int warp = 0; warp < warp_rank(); ++warp) before += memory_.warp_sums[warp];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (before <= rank_ && rank_ < before + count[k]) {
        memory_.digit = first + k;
        memory_.before = before;
      }
      if (pass == 2 && before <= rank_ + 1 && rank_ + 1 < before + count[k]) memory_.next_digit = first + k;
      if (pass == 0 && first + k == kNanDigit) memory_.has_nan = count[k] > 0;
      before += count[k];
    }
    __syncthreads();
    if constexpr (pass == 0) nan_ = memory_.has_nan;
    const uint32_t known = pass == 0 ? 0 : prefix_ * digits_of(pass);
    prefix_ = known + static_cast<uint32_t>(memory_.digit);
    rank_ -= memory_.before;
    if constexpr (pass == 2) {
      next_ = memory_.next_digit < digits_of(pass) ? known + static_cast<uint32_t>(memory_.next_digit) : kNoKey;
    }
  }

  // No block of the team reads another's counts any more.
  __device__ __forceinline__ void leave() const {
    if (team_ == Team::kCluster) cluster_sync();
  }

  // After the last pass
  __device__ __forceinline__ float quantile() const {
    if (nan_) return __uint_as_float(kNanKey);
    const uint32_t next = next_ != kNoKey ? next_ : above();
    const float lower = __uint_as_float(prefix_), upper = __uint_as_float(next);
    if (place_.weight == 0 || prefix_ == next) return lower;
    if (next == 0x7f800000u) return upper;
    // Rounded after each operation, as on the CPU
    const double low = lower, high = upper, difference = high - low;
    const double between = place_.weight < 0.5 ? __dadd_rn(low, __dmul_rn(difference, place_.weight))
                                               : __dadd_rn(high, -__dmul_rn(difference, 1 - place_.weight));
    return static_cast<float>(between);
  }

 private:
  template <int pass>
  __device__ __forceinline__ void join_above() {
    if constexpr (pass == 2) {
      const uint32_t above = warp_reduce(above_, Min<uint32_t>());
      if (lane() == 0) atomicMin(&memory_.above, above);
    }
  }

  template <int pass>
  __device__ __forceinline__ Count total(int digit) const {
    const int at = first_count(pass) + digit;
    if (team_ == Team::kBlock) return memory_.count[at];
    if (team_ == Team::kGrid) return __ldcg(&global_->count[at]);
    Count sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += map_shared_rank(&memory_.count[0], rank)[at];
    return sum;
  }

  __device__ __forceinline__ uint32_t above() const {
    if (team_ == Team::kBlock) return memory_.above;
    if (team_ == Team::kGrid) return __ldcg(&global_->above);
    uint32_t least = kNoKey;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
      const uint32_t other = *map_shared_rank(&memory_.above, rank);
      least = other < least ? other : least;
    }
    return least;
  }

  Team team_;
  SelectorMemory& memory_;
  SampleCounts* global_;
  QuantilePlace place_;
  Count rank_;              // among the keys that begin with the prefix
  uint32_t prefix_ = 0;     // the digits known so far
  uint32_t next_ = kNoKey;  // of the last pass: the key of the next rank, if it is among those counted
  uint32_t above_ = kNoKey;
  bool nan_ = false;
};

// ---- The values of a sample in memory, 16 bytes at a time, wherever they begin

template <typename T>
struct ValueSpan {
  static constexpr int V = kMaxVector<T>;

  const T* base;  // a multiple of 16 bytes
  int64_t first;  // the values are base[first], …, base[end - 1]
  int64_t end;

  __device__ __forceinline__ ValueSpan(const T* values, int64_t count) {
    first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(values) % 16 / sizeof(T));
    base = values - first;
    end = first + count;
  }

  // use(index of a vector, vector, which of its elements are values: from … to - 1), for this thread's vectors
  template <typename Use>
  __device__ __forceinline__ void for_each_vector(Use use) const {
    for (int64_t at = V * static_cast<int64_t>(threadIdx.x); at < end; at += V * kSelectThreads) {
      const int from = at < first ? static_cast<int>(first - at) : 0;
      const int to = end - at < V ? static_cast<int>(end - at) : V;
      Vector<T, V> vector{};
      if (to - from == V) {
        vector = load<V>(base + at);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (k >= from && k < to) vector[k] = base[at + k];
        }
      }
      use(at, vector, from, to);
    }
  }

  template <typename Use>
  __device__ __forceinline__ void for_each(Use use) const {
    for_each_vector([&](int64_t, const Vector<T, V>& vector, int from, int to) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k >= from && k < to) use(to_float(vector[k]));
      }
    });
  }
};

// ---- The passes as kernels of their own, for samples that no grid holds

struct SplitQuantile {
  const void* x;  // sample b begins at b * stride_b
  int64_t stride_b;
  int64_t size;  // of a sample
  int64_t chunk;
  int64_t chunks;  // of a sample
  SampleCounts* counts;
  QuantilePlace place;
  float* result;  // (batch,)
  bool only_nan;  // the result is NaN, or else 0: the first pass alone
};

// Clears the counts of all samples. Grid: any number of blocks.
__device__ __forceinline__ void clear_counts(SampleCounts* counts, int64_t batch) {
  static_assert(sizeof(SampleCounts) == (kCounts + 1) * sizeof(Count), "counts without gaps");
  Count* words = reinterpret_cast<Count*>(counts);
  const int64_t all = batch * (kCounts + 1);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x; i < all; i += step) {
    words[i] = i % (kCounts + 1) == kCounts ? ~Count{0} : 0;
  }
}

static __global__ void __launch_bounds__(kSelectThreads) clear_all_counts(SampleCounts* counts, int64_t batch) {
  clear_counts(counts, batch);
}

// Grid: a block per chunk, counted by chunk, then sample.
template <typename T, int pass>
__global__ void __launch_bounds__(kSelectThreads) count_pass(SplitQuantile s) {
  SHARED(memory, SelectorMemory);
  const int64_t sample = blockIdx.x / s.chunks;
  const int64_t begin = blockIdx.x % s.chunks * s.chunk;
  const int64_t count = s.size - begin < s.chunk ? s.size - begin : s.chunk;
  Selector selector(Team::kGrid, memory, s.counts + sample, s.place);
  selector.clear();
  if constexpr (pass > 0) selector.find<0>();
  if constexpr (pass > 1) selector.find<1>();
  const ValueSpan<T> span(static_cast<const T*>(s.x) + sample * s.stride_b + begin, count);
  span.for_each([&](float value) { selector.count<pass>(magnitude_key(value)); });
  selector.publish<pass>();
}

// Grid: a block per sample.
static __global__ void __launch_bounds__(kSelectThreads) finish_split(SplitQuantile s) {
  SHARED(memory, SelectorMemory);
  Selector selector(Team::kGrid, memory, s.counts + blockIdx.x, s.place);
  float result;
  if (s.only_nan) {
    result = selector.has_nan() ? __uint_as_float(kNanKey) : 0.0f;
  } else {
    selector.find<0>();
    selector.find<1>();
    selector.find<2>();
    result = selector.quantile();
  }
  if (threadIdx.x == 0) s.result[blockIdx.x] = result;
}

}  // namespace imagen_fast
