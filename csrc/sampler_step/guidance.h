// Classifier-free guidance, with its variants that need sums over a sample. With c the conditional and u the
// unconditional output, d = c - u, all of them are
//
//   plain                guided = u + scale d
//   removal of parallel  guided = c + (scale - 1) (d - k c),  k = <d, c> / <c, c>
//   rescale              guided times rescale * std(c) / std(guided) + (1 - rescale)
//
// that is, `multiplier` times u or c, plus `slope` times d. As guided is linear in c and u, its deviation follows from
// the sums of one pass.
#pragma once

#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vec.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA::sampler_step {

using namespace imagen_fast::sampler_step;

template <typename S>
struct Guided {
  bool from_conditional;
  S multiplier;
  S slope;

  void write(const S* conditional, const S* unconditional, S* to, int64_t n) const {
    for_each_vector<S>(n, [&](int64_t i, auto lanes) {
      using V = typename decltype(lanes)::V;
      const V c = load(conditional + i, lanes), u = load(unconditional + i, lanes);
      store(fma(V(slope), c - u, V(multiplier) * (from_conditional ? c : u)), to + i, lanes);
    });
  }
};

// Of c and u less a constant each, so that a large mean costs no accuracy
struct Sums {
  double c, u, cc, cu, uu;
};

template <typename S>
inline Sums row_sums(const S* conditional, const S* unconditional, double c_offset, double u_offset, int64_t n) {
  RowSum<double> c_sum, u_sum, cc, cu, uu;
  for_each_vector<double>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V c = load(conditional + i, lanes) - V(c_offset), u = load(unconditional + i, lanes) - V(u_offset);
    c_sum.add(c, lanes);
    u_sum.add(u, lanes);
    cc.add_product(c, c, lanes);
    cu.add_product(c, u, lanes);
    uu.add_product(u, u, lanes);
  });
  return {c_sum.total(), u_sum.total(), cc.total(), cu.total(), uu.total()};
}

// Over all of sample b, in float64 and in an order that depends on its shape alone
template <typename T>
inline Sums sample_sums(const Step& s, int64_t b, double c_offset, double u_offset) {
  using S = AccumulateType<T>;
  constexpr int64_t kRow = 1024;
  const int64_t blocks = (s.positions + kRow - 1) / kRow;
  Buffer<Sums> parts(blocks * s.channels);
  parallel_for(blocks, kRow * s.channels, [&](int64_t begin, int64_t end) {
    alignas(64) S c_scratch[kRow], u_scratch[kRow];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i * kRow, n = s.positions - p < kRow ? s.positions - p : kRow;
      for (int64_t c = 0; c < s.channels; ++c) {
        const S* conditional = read_row<T>(s.output, b, c, p, n, c_scratch);
        const S* unconditional = read_row<T>(s.unconditional, b, c, p, n, u_scratch);
        parts[i * s.channels + c] = row_sums(conditional, unconditional, c_offset, u_offset, n);
      }
    }
  });
  Sums all = parts[0];
  for (int64_t i = 1; i < blocks * s.channels; ++i) {
    all = {all.c + parts[i].c, all.u + parts[i].u, all.cc + parts[i].cc, all.cu + parts[i].cu, all.uu + parts[i].uu};
  }
  return all;
}

template <typename T, typename S = AccumulateType<T>>
inline Guided<S> make_guidance(const Step& s, int64_t b) {
  if (!s.unconditional.data) return {true, S(1), S(0)};
  if (!s.remove_parallel && s.rescale == 0) return {false, S(1), static_cast<S>(s.guidance)};

  S first[2];
  const double c0 = *read_row<T>(s.output, b, 0, 0, 1, first);
  const double u0 = *read_row<T>(s.unconditional, b, 0, 0, 1, first + 1);
  const double n = static_cast<double>(s.channels * s.positions);
  const Sums sums = sample_sums<T>(s, b, c0, u0);
  double multiplier = 1;
  double slope = s.guidance - 1;
  if (s.remove_parallel) {
    const double cc = sums.cc + 2 * c0 * sums.c + n * c0 * c0;
    const double cu = sums.cu + c0 * sums.u + u0 * sums.c + n * c0 * u0;
    // As in the reference, a length of zero leaves the difference as it is.
    multiplier -= slope * ((cc - cu) / (cc < 1e-24 ? 1e-24 : cc));
  }
  if (s.rescale != 0) {
    const double c_mean = sums.c / n, u_mean = sums.u / n;
    const double c_variance = (sums.cc - n * c_mean * c_mean) / (n - 1);
    const double u_variance = (sums.uu - n * u_mean * u_mean) / (n - 1);
    const double covariance = (sums.cu - n * c_mean * u_mean) / (n - 1);
    const double from_c = multiplier + slope, from_u = -slope;
    const double variance =
        from_c * from_c * c_variance + from_u * from_u * u_variance + 2 * from_c * from_u * covariance;
    const double factor = s.rescale * std::sqrt(c_variance / variance) + (1 - s.rescale);
    multiplier *= factor;
    slope *= factor;
  }
  return {true, static_cast<S>(multiplier), static_cast<S>(slope)};
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA::sampler_step
