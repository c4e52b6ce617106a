// A step with a dynamic threshold: x0, the quantile of its magnitudes over the sample, and the rest.
//
// Where the blocks that select a sample's quantile (see common/cuda_quantile.cuh) have room for it, one kernel does it
// all and keeps x0 in shared memory, and what the sample and the output give to the result beside it: each tensor is
// read once. Otherwise x0 is kept in global memory, and `step_elements` comes last.
#pragma once

#include "../common/cuda_quantile.cuh"
#include "kernel_elements.cuh"

namespace imagen_fast::sampler_step::device {

// Made by plan.h
struct Residence {
  Team team;
  int blocks;      // of a sample
  int64_t teams;   // samples at a time
  int64_t rounds;  // until all samples had their turn
  int64_t chunk;   // elements of a block, a multiple of 8
  bool keeps_update;
  bool only_nan;  // the threshold is known; only whether any x0 is NaN matters
  SampleCounts* counts;
  QuantilePlace place;
};

template <int V>
__device__ __forceinline__ void count_first(Selector& selector, bool only_nan, const Floats<V>& x0, int count) {
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k >= count) continue;
    if (only_nan) {
      selector.count_nan(magnitude_key(x0[k]));
    } else {
      selector.count<0>(magnitude_key(x0[k]));
    }
  }
}

// The quantile of the x0 that this block and the others of its team keep, the first pass over them being made
template <int V>
__device__ __forceinline__ float select_quantile(Selector& selector, bool only_nan, const float* x0, int64_t count) {
  selector.close<0>();
  if (only_nan) return selector.has_nan() ? nan_float() : 0.0f;
  const auto for_each_key = [&](auto use) {
    for (int64_t i = V * static_cast<int64_t>(threadIdx.x); i < count; i += V * kSelectThreads) {
      const int valid = count - i < V ? static_cast<int>(count - i) : V;
      const Floats<V> values = kept<V>(x0 + i, valid);  // this thread's own
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k < valid) use(magnitude_key(values[k]));
      }
    }
  };
  selector.find<0>();
  for_each_key([&](uint32_t key) { selector.count<1>(key); });
  selector.close<1>();
  selector.find<1>();
  for_each_key([&](uint32_t key) { selector.count<2>(key); });
  selector.close<2>();
  selector.find<2>();
  return selector.quantile();
}

// Grid: `blocks` blocks for each team, one after the other. A cluster is a team, and so is a block.
template <typename T, int V>
__global__ void __launch_bounds__(kSelectThreads, 1) step_resident(Problem p, Residence r) {
  SHARED(memory, SelectorMemory);
  float* x0_kept = dynamic_shared<float>();
  float* update_kept = x0_kept + r.chunk;
  const int64_t size = p.order.size();
  const int64_t begin = min(blockIdx.x % static_cast<unsigned>(r.blocks) * r.chunk, size);
  const Coefficients c(p);
  if (r.team == Team::kGrid) {
    clear_counts(r.counts, p.batch);
    grid_sync();
  }
  for (int64_t round = 0; round < r.rounds; ++round) {
    // In the last round some teams have nothing to do, but the barriers are for all.
    const int64_t sample = blockIdx.x / static_cast<unsigned>(r.blocks) + round * r.teams;
    const bool active = sample < p.batch;
    const int64_t end = active ? min(begin + r.chunk, size) : begin;
    const Guided g(p, active ? sample : 0);
    Selector selector(r.team, memory, r.counts + (active ? sample : 0), r.place);
    selector.clear();
    const int64_t first = begin + V * static_cast<int64_t>(threadIdx.x);
    for (int64_t i = first; i < end; i += V * kSelectThreads) {
      const Place at = place_at<V>(p.order, i, end);
      Floats<V> x0, update;
      if (r.keeps_update) {
        combine<T, V, true, true>(p, c, g, sample, at, x0, update);
        keep<V>(update_kept + (i - begin), update, V);
      } else {
        combine<T, V, true, false>(p, c, g, sample, at, x0, update);
      }
      keep<V>(x0_kept + (i - begin), x0, V);
      count_first<V>(selector, r.only_nan, x0, at.count);
    }
    const Limit limit(p, select_quantile<V>(selector, r.only_nan, x0_kept, end - begin));
    for (int64_t i = first; i < end; i += V * kSelectThreads) {
      const Place at = place_at<V>(p.order, i, end);
      Floats<V> x0, update;
      if (r.keeps_update) {
        update = kept<V>(update_kept + (i - begin), V);
      } else {
        combine<T, V, false, true>(p, c, g, sample, at, x0, update);
      }
      x0 = kept<V>(x0_kept + (i - begin), V);
      finish<T, V>(p, c, limit, sample, at, x0, update);
    }
    selector.leave();
  }
}

// The first of several launches: x0 (batch, size), and the first pass of the selection. Grid: a block per chunk.
template <typename T, int V>
__global__ void __launch_bounds__(kSelectThreads, 1) step_x0(Problem p, Chunks chunks, SplitQuantile s, float* to) {
  SHARED(memory, SelectorMemory);
  const ChunkOfSample mine(chunks, p.order.size());
  const Coefficients c(p);
  const Guided g(p, mine.sample);
  Selector selector(Team::kGrid, memory, s.counts + mine.sample, s.place);
  selector.clear();
  for (int64_t i = mine.begin + V * static_cast<int64_t>(threadIdx.x); i < mine.end; i += V * kSelectThreads) {
    const Place at = place_at<V>(p.order, i, mine.end);
    Floats<V> x0, update;
    combine<T, V, true, false>(p, c, g, mine.sample, at, x0, update);
    keep<V>(to + mine.sample * p.order.size() + i, x0, at.count);
    count_first<V>(selector, s.only_nan, x0, at.count);
  }
  selector.publish<0>();
}

}  // namespace imagen_fast::sampler_step::device
