// What a step does to single elements (problem.h has the formulas), and the kernel that does no more than that. In it a
// block takes a chunk of a sample; x0 is computed there or was before, when its quantile was selected.
#pragma once

#include "../common/cuda_philox.cuh"
#include "../common/cuda_samples.cuh"
#include "problem.h"

namespace imagen_fast::sampler_step::device {

constexpr int kThreads = 256;
constexpr uint32_t kStage = 0;  // of the noise stream

struct Problem {
  SampleOrder order;  // of sample and the results
  int64_t batch;
  View sample, output, unconditional, variance, previous_x0, noise;
  const int64_t* seed;  // (batch,), where there is no tensor of noise
  const double* rows;   // (row_count, row_stride)
  int64_t row_stride;
  int64_t row_count;
  const int64_t* index;
  float guidance;
  const float2* guided;  // (batch,) multiplier and slope, where guidance takes sums over a sample
  Threshold threshold;
  float min_value, max_value;
  void* next;
  void* x0;  // or null
};

__device__ __forceinline__ float nan_float() { return __uint_as_float(0x7fffffffu); }

// A row of the table, all NaN if there is none of that index
struct Coefficients {
  float x0_from_sample, x0_from_output, x0_from_noise;
  float next_from_sample, next_from_output, next_from_x0, next_from_previous_x0;
  float noise_scale, half_min_log_variance, half_max_log_variance;
  uint32_t index;

  __device__ __forceinline__ explicit Coefficients(const Problem& p) {
    const int64_t i = *p.index;
    const bool known = i >= 0 && i < p.row_count;
    const auto value = [&](int column, double factor) {
      return known ? static_cast<float>(factor * p.rows[i * p.row_stride + column]) : nan_float();
    };
    x0_from_sample = value(0, 1), x0_from_output = value(1, 1), x0_from_noise = value(2, 1);
    next_from_sample = value(3, 1), next_from_output = value(4, 1), next_from_x0 = value(5, 1);
    next_from_previous_x0 = value(6, 1), noise_scale = value(7, 1);
    half_min_log_variance = value(8, 0.5), half_max_log_variance = value(9, 0.5);
    index = static_cast<uint32_t>(i);
  }
};

// guided = multiplier (c or u) + slope (c - u), see guidance.h
struct Guided {
  bool from_conditional;
  float multiplier;
  float slope;

  __device__ __forceinline__ Guided(const Problem& p, int64_t sample)
      : from_conditional(p.guided != nullptr), multiplier(1.0f), slope(p.guidance) {
    if (!p.guided) return;
    multiplier = p.guided[sample].x;
    slope = p.guided[sample].y;
  }
};

// What is multiplied by a coefficient that is not 0, but is not there, is NaN.
template <typename T, int V>
__device__ __forceinline__ Floats<V> read_or_nan(const View& view, int64_t sample, const Place& at) {
  return view.data ? read<T, V>(view, sample, at) : all_floats<V>(nan_float());
}

template <typename T, int V>
__device__ __forceinline__ Floats<V> read_guided(const Problem& p, const Guided& g, int64_t sample, const Place& at) {
  Floats<V> c = read<T, V>(p.output, sample, at);
  if (!p.unconditional.data) return c;
  const Floats<V> u = read<T, V>(p.unconditional, sample, at);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    c[k] = fmaf(g.slope, __fsub_rn(c[k], u[k]), __fmul_rn(g.multiplier, g.from_conditional ? c[k] : u[k]));
  }
  return c;
}

// With V > 1 and a seed the order is that in which noise counts elements: channels, then positions.
template <typename T, int V>
__device__ __forceinline__ Floats<V> read_noise(const Problem& p, uint32_t row, int64_t sample, const Place& at) {
  if (!p.seed) return read_or_nan<T, V>(p.noise, sample, at);
  const NoiseStream stream{static_cast<uint64_t>(p.seed[sample]), row, kStage};
  Floats<V> noise;
  if constexpr (V == 1) {
    const uint64_t element = static_cast<uint64_t>(at.channel * p.order.positions + at.position);
    const uint4 w = philox_words(stream, element / 4);
    const float2 pair = element & 2 ? box_muller(w.z, w.w) : box_muller(w.x, w.y);
    noise[0] = element & 1 ? pair.y : pair.x;
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 4) {
      const float4 normals = philox_normals(stream, static_cast<uint64_t>(at.first + k) / 4);
      noise[k] = normals.x, noise[k + 1] = normals.y, noise[k + 2] = normals.z, noise[k + 3] = normals.w;
    }
  }
  return noise;
}

// x0 before the threshold, and the terms of next that the sample and the output give: whichever of the two is asked for
template <typename T, int V, bool kX0, bool kUpdate>
__device__ __forceinline__ void combine(const Problem& p, const Coefficients& c, const Guided& g, int64_t sample,
                                        const Place& at, Floats<V>& x0, Floats<V>& update) {
  const auto add_terms = [&](float for_x0, float for_update, auto read_values) {
    const bool in_x0 = kX0 && for_x0 != 0, in_update = kUpdate && for_update != 0;
    if (!in_x0 && !in_update) return;
    const Floats<V> values = read_values();
    if (in_x0) add_product(x0, for_x0, values);
    if (in_update) add_product(update, for_update, values);
  };
  if (kX0) x0 = all_floats<V>(0.0f);
  if (kUpdate) update = all_floats<V>(0.0f);
  add_terms(c.x0_from_sample, c.next_from_sample, [&] { return read<T, V>(p.sample, sample, at); });
  add_terms(c.x0_from_output, c.next_from_output, [&] { return read_guided<T, V>(p, g, sample, at); });
  if (kX0 && c.x0_from_noise != 0) add_product(x0, c.x0_from_noise, read_noise<T, V>(p, c.index, sample, at));
}

// What the threshold does to the x0 of a sample
struct Limit {
  bool clips;
  bool spoilt;  // the whole sample becomes NaN
  float reciprocal;

  // The quantile of |x0| matters for a dynamic threshold alone; where it need not be known, whether it is NaN.
  __device__ __forceinline__ Limit(const Problem& p, float quantile)
      : clips(p.threshold != Threshold::kNone), spoilt(false), reciprocal(1.0f) {
    if (p.threshold != Threshold::kDynamic) return;
    float limit = quantile;
    if (limit < p.min_value) limit = p.min_value;
    if (limit > p.max_value) limit = p.max_value;
    spoilt = limit != limit;
    reciprocal = __fdiv_rn(1.0f, limit);
  }

  template <int V>
  __device__ __forceinline__ void apply(Floats<V>& x0) const {
    if (!clips) return;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float scaled = __fmul_rn(x0[k], reciprocal);
      x0[k] = scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled;  // NaN stays
    }
  }
};

// From x0 before the threshold, and `update` of `combine`, to the results in memory
template <typename T, int V>
__device__ __forceinline__ void finish(const Problem& p, const Coefficients& c, const Limit& limit, int64_t sample,
                                       const Place& at, Floats<V> x0, Floats<V> update) {
  const int64_t start = sample * p.order.size();
  limit.apply(x0);
  if (limit.spoilt) x0 = update = all_floats<V>(nan_float());
  if (p.x0) write<T, V>(static_cast<T*>(p.x0) + start, at, x0);
  if (c.next_from_x0 != 0) add_product(update, c.next_from_x0, x0);
  if (c.next_from_previous_x0 != 0) {
    add_product(update, c.next_from_previous_x0, read_or_nan<T, V>(p.previous_x0, sample, at));
  }
  if (c.noise_scale != 0) {
    Floats<V> noise = read_noise<T, V>(p, c.index, sample, at);
    if (p.variance.data) {
      const Floats<V> variance = read<T, V>(p.variance, sample, at);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float share = fmaf(variance[k], 0.5f, 0.5f);
        const float low = __fmul_rn(__fsub_rn(1.0f, share), c.half_min_log_variance);
        noise[k] = __fmul_rn(noise[k], expf(fmaf(share, c.half_max_log_variance, low)));
      }
    }
    add_product(update, c.noise_scale, noise);
  }
  write<T, V>(static_cast<T*>(p.next) + start, at, update);
}

// x0 in float32 at numbers at.first, … of an array that begins at a multiple of 16 bytes

template <int V>
__device__ __forceinline__ void keep(float* to, const Floats<V>& values, int count) {
  if constexpr (V == 1) {
    *to = values[0];
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 4) {
      if (k + 4 <= count) {
        store<4>(to + k, Vector<float, 4>{{values[k], values[k + 1], values[k + 2], values[k + 3]}});
      } else {
#pragma unroll
        for (int j = k; j < k + 4; ++j) {
          if (j < count) to[j] = values[j];
        }
      }
    }
  }
}

template <int V>
__device__ __forceinline__ Floats<V> kept(const float* from, int count) {
  Floats<V> values;
  if constexpr (V == 1) {
    values[0] = *from;
  } else {
#pragma unroll
    for (int k = 0; k < V; k += 4) {
      const bool whole = k + 4 <= count;
      const Vector<float, 4> four = whole ? load<4>(from + k) : Vector<float, 4>{};
#pragma unroll
      for (int j = 0; j < 4; ++j) values[k + j] = whole ? four[j] : k + j < count ? from[k + j] : 0.0f;
    }
  }
  return values;
}

struct Chunks {
  int64_t chunks;  // of a sample
  int64_t chunk;   // elements, a multiple of those in 16 bytes
};

// Of a block: counted by chunk, then sample
struct ChunkOfSample {
  int64_t sample;
  int64_t begin;
  int64_t end;

  __device__ __forceinline__ ChunkOfSample(const Chunks& c, int64_t size)
      : sample(blockIdx.x / c.chunks), begin(blockIdx.x % c.chunks * c.chunk) {
    end = begin + c.chunk < size ? begin + c.chunk : size;
  }
};

// With x0 (batch, size) and its quantiles (batch,) known, or both null. x0 may be where next will be.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    step_elements(Problem p, Chunks chunks, const float* known_x0, const float* quantiles) {
  const ChunkOfSample mine(chunks, p.order.size());
  const Coefficients c(p);
  const Guided g(p, mine.sample);
  const Limit limit(p, quantiles ? quantiles[mine.sample] : 0.0f);
  for (int64_t i = mine.begin + V * static_cast<int64_t>(threadIdx.x); i < mine.end; i += V * kThreads) {
    const Place at = place_at<V>(p.order, i, mine.end);
    Floats<V> x0, update;
    if (known_x0) {
      combine<T, V, false, true>(p, c, g, mine.sample, at, x0, update);
      x0 = kept<V>(known_x0 + mine.sample * p.order.size() + i, at.count);
    } else {
      combine<T, V, true, true>(p, c, g, mine.sample, at, x0, update);
    }
    finish<T, V>(p, c, limit, mine.sample, at, x0, update);
  }
}

// For tests: the words (counters, 4) and normals of a stream's counters
static __global__ void philox_test(const int64_t* seed, uint32_t row, uint32_t stage, uint64_t first_counter,
                                   int64_t counters, uint32_t* words, float* normals) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= counters) return;
  const NoiseStream stream{static_cast<uint64_t>(*seed), row, stage};
  const uint4 w = philox_words(stream, first_counter + static_cast<uint64_t>(i));
  const float4 z = philox_normals(stream, first_counter + static_cast<uint64_t>(i));
  store<4>(words + 4 * i, Vector<uint32_t, 4>{{w.x, w.y, w.z, w.w}});
  store<4>(normals + 4 * i, Vector<float, 4>{{z.x, z.y, z.z, z.w}});
}

}  // namespace imagen_fast::sampler_step::device
