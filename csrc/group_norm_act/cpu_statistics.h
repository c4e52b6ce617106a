// Mean and variance that stay exact when the mean is large, in one pass: a chunk of a slab is summed, with its squares,
// around the mean p of its own first part, and the chunks are combined in float64.
//
// Why that is safe whatever the data: if p is the mean of a fraction f of n values with mean m and variance v, the rest
// has mean q with m - p = (1 - f)(q - p), and v is at least f (1 - f) (q - p)^2. So (m - p)^2 <= v (1 - f) / f, and in
//   v = sum((x - p)^2) / n - (m - p)^2
// the difference is at least f times its larger term: for f = 1/8, three bits at most are lost.
//
// Where bf16 values can be summed as they are for less (cpu_pair_sums.h), p is 0 unless that loses more than three
// bits, which it does if the mean is almost three times the standard deviation.
#pragma once

#include "cpu_common.h"
#include "cpu_pair_sums.h"

namespace imagen_fast::IMAGEN_FAST_ISA::group_norm_act {

constexpr int64_t kPivotShare = 8;  // 1 / f

// Of one chunk; deviations is the sum of (x - mean)^2
struct Moments {
  double mean;
  double deviations;
};

// From sums of d and d^2 over `count` values of d = x - pivot
inline Moments moments_around(double pivot, double sum_d, double sum_d2, double count) {
  return {pivot + sum_d / count, sum_d2 - sum_d * sum_d / count};
}

// Whether moments around 0 are as exact as those around a pivot. They are not if squares have overflowed, or were so
// small that they may have been flushed to zero.
inline bool is_exact(const Moments& moments, double count) {
  const double variance = moments.deviations / count;
  return moments.mean * moments.mean <= (kPivotShare - 1) * variance && variance > 0x1p-100 && std::isfinite(variance);
}

template <typename T>
inline Moments chunk_moments_around_pivot(const T* x, int64_t n) {
  using S = AccumulateType<T>;
  const int64_t first = ceil_div(n, kPivotShare);
  RowSum<S> total;
  for_each_vector<S>(first, [&](int64_t i, auto lanes) { total.add(load(x + i, lanes), lanes); });
  const S pivot = total.total() / static_cast<S>(first);

  RowSum<S> sum_d;
  RowSum<S> sum_d2;
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    const auto d = load(x + i, lanes) - pivot;
    sum_d.add(d, lanes);
    sum_d2.add_product(d, d, lanes);
  });
  return moments_around(pivot, sum_d.total(), sum_d2.total(), static_cast<double>(n));
}

template <typename T>
inline Moments chunk_moments(const T* x, int64_t n) {
  if constexpr (kSumsPairs<T>) {
    const auto [sum, squares] = row_pair_sums(x, n);
    const Moments moments = moments_around(0, sum, squares, static_cast<double>(n));
    if (is_exact(moments, static_cast<double>(n))) return moments;
  }
  return chunk_moments_around_pivot(x, n);
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
  for (int64_t c = 0; c < width; ++c) sums[c] = 0;
  for_each_column_vector<S>(
      n, width, [&](int64_t i, int64_t c, auto lanes) { add_to_column(load(x + i, lanes), sums + c, lanes); });
}

// The same for d and d^2, d = x - pivot[c]
template <typename T, typename S>
inline void column_sums_around(const T* x, int64_t n, int64_t width, const S* pivot, S* sum_d, S* sum_d2) {
  for (int64_t c = 0; c < width; ++c) sum_d[c] = sum_d2[c] = 0;
  for_each_column_vector<S>(n, width, [&](int64_t i, int64_t c, auto lanes) {
    const auto d = load(x + i, lanes) - load_column(pivot + c, lanes);
    add_to_column(d, sum_d + c, lanes);
    add_product_to_column(d, d, sum_d2 + c, lanes);
  });
}

// The sum of group g's columns
template <typename S>
inline double group_sum(const S* columns, int64_t g, int64_t group_size) {
  double total = 0;
  for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) total += columns[c];
  return total;
}

// The moments of every group over n elements of channels-last memory; scratch holds 3 * columns.width values.
template <typename T, typename S>
inline void block_moments_around_pivot(const T* x, int64_t n, const Columns& columns, int64_t groups, S* scratch,
                                       Moments* moments) {
  const int64_t group_size = columns.channels / groups;
  const double count = static_cast<double>(n) / static_cast<double>(groups);
  S* pivot = scratch;
  S* sum_d = scratch + columns.width;
  S* sum_d2 = scratch + 2 * columns.width;

  S* sums = sum_d;
  const int64_t first = ceil_div(n / columns.channels, kPivotShare) * columns.channels;  // whole positions
  column_sums(x, first, columns.width, sums);
  columns.fold(sums);
  for (int64_t g = 0; g < groups; ++g) {
    const S mean = static_cast<S>(group_sum(sums, g, group_size)) / static_cast<S>(first / groups);
    for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) pivot[c] = mean;
  }
  columns.repeat(pivot);

  column_sums_around(x, n, columns.width, pivot, sum_d, sum_d2);
  columns.fold(sum_d);
  columns.fold(sum_d2);
  for (int64_t g = 0; g < groups; ++g) {
    moments[g] =
        moments_around(pivot[g * group_size], group_sum(sum_d, g, group_size), group_sum(sum_d2, g, group_size), count);
  }
}

// The same around 0; false if that is not exact for every group. Groups have an even number of channels.
template <typename T, typename S>
inline bool block_moments_of_pairs(const T* x, int64_t n, const Columns& columns, int64_t groups, S* scratch,
                                   Moments* moments) {
  const int64_t group_size = columns.channels / groups;
  const double count = static_cast<double>(n) / static_cast<double>(groups);
  S* sums = scratch;
  S* squares = scratch + columns.width;
  column_pair_sums(x, n, columns.width, sums, squares);
  const Columns pairs = columns.halved();
  pairs.fold(sums);
  pairs.fold(squares);
  bool exact = true;
  for (int64_t g = 0; g < groups; ++g) {
    moments[g] = moments_around(0, group_sum(sums, g, group_size / 2), group_sum(squares, g, group_size / 2), count);
    exact = exact && is_exact(moments[g], count);
  }
  return exact;
}

template <typename T, typename S>
inline void block_moments(const T* x, int64_t n, const Columns& columns, int64_t groups, S* scratch, Moments* moments) {
  if constexpr (kSumsPairs<T>) {
    const bool in_pairs = columns.channels / groups % 2 == 0;
    if (in_pairs && block_moments_of_pairs(x, n, columns, groups, scratch, moments)) return;
  }
  block_moments_around_pivot(x, n, columns, groups, scratch, moments);
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA::group_norm_act
