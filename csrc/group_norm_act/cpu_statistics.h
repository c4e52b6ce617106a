// Mean and variance that stay exact when the mean is large: every chunk of a slab is summed, then summed again around its
// own mean while it is in the first-level cache, and the chunks are combined in float64. The second sum also gives back
// what rounding the chunk's mean to float lost.
#pragma once

#include "cpu_common.h"

namespace imagen_fast::IMAGEN_FAST_ISA::group_norm_act {

// Of one chunk; deviations is the sum of (x - mean)^2
struct Moments {
  double mean;
  double deviations;
};

// From sums of d and d^2 over `count` values of d = x - pivot
inline Moments moments_around(double pivot, double sum_d, double sum_d2, double count) {
  return {pivot + sum_d / count, sum_d2 - sum_d * sum_d / count};
}

template <typename T>
inline Moments chunk_moments(const T* x, int64_t n) {
  using S = AccumulateType<T>;
  using V = Vec<S>;
  V total[4] = {V(0), V(0), V(0), V(0)};
  for_each_vector_in_slots<V::kWidth>(
      n, [&](int64_t i, int slot, auto lanes) { total[slot] = total[slot] + V::load(x + i, lanes); });
  const S pivot = sum_slots(total) / static_cast<S>(n);

  V sum_d[4] = {V(0), V(0), V(0), V(0)};
  V sum_d2[4] = {V(0), V(0), V(0), V(0)};
  for_each_vector_in_slots<V::kWidth>(n, [&](int64_t i, int slot, auto lanes) {
    const V d = keep(V::load(x + i, lanes) - V(pivot), lanes);
    sum_d[slot] = sum_d[slot] + d;
    sum_d2[slot] = fma(d, d, sum_d2[slot]);
  });
  return moments_around(pivot, sum_slots(sum_d), sum_slots(sum_d2), static_cast<double>(n));
}

// A group's mean in two parts (the float nearest to it, and what is missing), and 1 / deviation
template <typename S>
struct Statistics {
  S mean;
  S mean_rest;
  S rstd;
};

// Combines `chunks` of `size` values each, the last of `last_size`; chunk k is moments[k * stride].
template <typename S>
inline Statistics<S> combine(const Moments* moments, int64_t stride, int64_t chunks, double size, double last_size,
                             double eps) {
  const Moments& last = moments[(chunks - 1) * stride];
  const double count = size * static_cast<double>(chunks - 1) + last_size;
  double sum = 0;
  for (int64_t k = 0; k + 1 < chunks; ++k) sum += moments[k * stride].mean;
  const double mean = (sum * size + last.mean * last_size) / count;

  double within = last.deviations;
  double between = 0;
  for (int64_t k = 0; k + 1 < chunks; ++k) {
    const double d = moments[k * stride].mean - mean;
    within += moments[k * stride].deviations;
    between += d * d;
  }
  const double deviations = within + between * size + (last.mean - mean) * (last.mean - mean) * last_size;
  // Rounding may leave a constant group a hair below zero; a NaN must stay one.
  const double variance = deviations < 0 ? 0 : deviations / count;
  const S rounded = static_cast<S>(mean);
  return {rounded, static_cast<S>(mean - rounded), static_cast<S>(1 / std::sqrt(variance + eps))};
}

// sums[c] = sum of x over the rows of column c; x has n elements, its last row may be short.
template <typename T, typename S>
inline void column_sums(const T* x, int64_t n, int64_t width, S* sums) {
  using V = Vec<S>;
  for (int64_t c = 0; c < width; ++c) sums[c] = 0;
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    for_each_vector<V::kWidth>(width, [&](int64_t c, auto lanes) {
      const T* row = x + i + c;
      const V pair = V::load(row, lanes) + V::load(row + width, lanes);
      const V other = V::load(row + 2 * width, lanes) + V::load(row + 3 * width, lanes);
      (V::load(sums + c, lanes) + (pair + other)).store(sums + c, lanes);
    });
  }
  for (; i < n; i += width) {
    for_each_vector<V::kWidth>(n - i < width ? n - i : width, [&](int64_t c, auto lanes) {
      (V::load(sums + c, lanes) + V::load(x + i + c, lanes)).store(sums + c, lanes);
    });
  }
}

// The same for d and d^2, d = x - pivot[c]
template <typename T, typename S>
inline void column_sums_around(const T* x, int64_t n, int64_t width, const S* pivot, S* sum_d, S* sum_d2) {
  using V = Vec<S>;
  for (int64_t c = 0; c < width; ++c) sum_d[c] = sum_d2[c] = 0;
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    for_each_vector<V::kWidth>(width, [&](int64_t c, auto lanes) {
      const T* row = x + i + c;
      const V center = V::load(pivot + c, lanes);
      const V d0 = V::load(row, lanes) - center;
      const V d1 = V::load(row + width, lanes) - center;
      const V d2 = V::load(row + 2 * width, lanes) - center;
      const V d3 = V::load(row + 3 * width, lanes) - center;
      (V::load(sum_d + c, lanes) + ((d0 + d1) + (d2 + d3))).store(sum_d + c, lanes);
      const V squares = fma(d0, d0, d1 * d1) + fma(d2, d2, d3 * d3);
      (V::load(sum_d2 + c, lanes) + squares).store(sum_d2 + c, lanes);
    });
  }
  for (; i < n; i += width) {
    for_each_vector<V::kWidth>(n - i < width ? n - i : width, [&](int64_t c, auto lanes) {
      const V d = V::load(x + i + c, lanes) - V::load(pivot + c, lanes);
      (V::load(sum_d + c, lanes) + d).store(sum_d + c, lanes);
      fma(d, d, V::load(sum_d2 + c, lanes)).store(sum_d2 + c, lanes);
    });
  }
}

// The moments of every group over n elements of channels-last memory; scratch holds 3 * columns.width values.
template <typename T, typename S>
inline void block_moments(const T* x, int64_t n, const Columns& columns, int64_t groups, S* scratch, Moments* moments) {
  const int64_t group_size = columns.channels / groups;
  const double count = static_cast<double>(n) / static_cast<double>(groups);
  S* pivot = scratch;
  S* sum_d = scratch + columns.width;
  S* sum_d2 = scratch + 2 * columns.width;

  S* sums = sum_d;
  column_sums(x, n, columns.width, sums);
  columns.fold(sums);
  for (int64_t g = 0; g < groups; ++g) {
    S total = 0;
    for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) total += sums[c];
    const S mean = total / static_cast<S>(count);
    for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) pivot[c] = mean;
  }
  columns.repeat(pivot);

  column_sums_around(x, n, columns.width, pivot, sum_d, sum_d2);
  columns.fold(sum_d);
  columns.fold(sum_d2);
  for (int64_t g = 0; g < groups; ++g) {
    double total_d = 0;
    double total_d2 = 0;
    for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) {
      total_d += sum_d[c];
      total_d2 += sum_d2[c];
    }
    moments[g] = moments_around(pivot[g * group_size], total_d, total_d2, count);
  }
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA::group_norm_act
