// The quantile of |x| over each sample (see common/cuda_quantile.cuh), where the values of a sample are in the shared
// memory of the blocks that select it: read once from global memory. For larger samples the kernels are those of
// cuda_quantile.cuh.
#pragma once

#include "../common/cuda_quantile.cuh"

namespace imagen_fast::abs_quantile::device {

struct Resident {
  const void* x;
  int64_t batch;
  int64_t stride_b;
  int64_t size;  // of a sample
  Team team;
  int blocks;      // of a sample
  int64_t teams;   // samples at a time
  int64_t rounds;  // until all samples had their turn
  int64_t chunk;   // values of a block
  SampleCounts* counts;
  QuantilePlace place;
  float* result;
};

// Grid: `blocks` blocks for each team, one after the other. A cluster is a team, and so is a block.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads, 1) quantile_resident(Resident r) {
  constexpr int V = kMaxVector<T>;
  SHARED(memory, SelectorMemory);
  T* kept = dynamic_shared<T>();
  const int64_t rank = blockIdx.x % static_cast<unsigned>(r.blocks);
  const int64_t first_sample = blockIdx.x / static_cast<unsigned>(r.blocks);
  if (r.team == Team::kGrid) {
    clear_counts(r.counts, r.batch);
    grid_sync();
  }
  for (int64_t round = 0; round < r.rounds; ++round) {
    const int64_t sample = first_sample + round * r.teams;
    // In the last round some teams have nothing to do, but the barriers are for all.
    const int64_t begin = min(rank * r.chunk, r.size);
    const int64_t count = sample < r.batch ? min(r.size - begin, r.chunk) : 0;
    const int64_t known = sample < r.batch ? sample : 0;
    Selector selector(r.team, memory, r.counts + known, r.place);
    selector.clear();
    const ValueSpan<T> span(static_cast<const T*>(r.x) + known * r.stride_b + begin, count);
    span.for_each_vector([&](int64_t at, const Vector<T, V>& vector, int from, int to) {
      store<V>(kept + at, vector);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k >= from && k < to) selector.count<0>(magnitude_key(to_float(vector[k])));
      }
    });
    selector.close<0>();
    selector.find<0>();
    const auto for_each_kept = [&](auto use) {
      for (int64_t at = V * static_cast<int64_t>(threadIdx.x); at < span.end; at += V * kSelectThreads) {
        const Vector<T, V> vector = load<V>(kept + at);  // its own
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (at + k >= span.first && at + k < span.end) use(magnitude_key(to_float(vector[k])));
        }
      }
    };
    for_each_kept([&](uint32_t key) { selector.count<1>(key); });
    selector.close<1>();
    selector.find<1>();
    for_each_kept([&](uint32_t key) { selector.count<2>(key); });
    selector.close<2>();
    selector.find<2>();
    const float quantile = selector.quantile();
    if (rank == 0 && sample < r.batch && threadIdx.x == 0) r.result[sample] = quantile;
    selector.leave();
  }
}

}  // namespace imagen_fast::abs_quantile::device
