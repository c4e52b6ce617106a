// exp, the logistic function and the normal distribution on Vec<S>: floats by polynomials to a few ulp, doubles by the
// C library. Infinities and NaNs come out as from the C library.
#pragma once

#include "vec.h"

namespace imagen_fast::IMAGEN_FAST_ISA {

// exp(v) for v <= 0
IMAGEN_FAST_INLINE Vec<float> exp_nonpositive(Vec<float> v) {
  using V = Vec<float>;
  v = max(v, V(-104.0f));  // exp(-104) rounds to 0
  const V n = round(v * V(0x1.715476p0f));
  // v - n ln 2, with ln 2 in two parts of which the first has 15 bits: n * first is exact
  V r = fma(n, V(-0x1.62e4p-1f), v);
  r = fma(n, V(-0x1.7f7d1cp-20f), r);
  // exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2) / 2, q minimax to 8e-9 of exp(r)
  const V r2 = r * r;
  const V low = fma(V(0.16666576266288757f), r, V(0.5f));
  const V high = fma(V(0.008363205008208752f), r, V(0.04166637361049652f));
  const V q = fma(fma(V(0.0013941165525466204f), r2, high), r2, low);
  return scale_exponent(fma(q, r2, r) + V(1.0f), n);
}

IMAGEN_FAST_INLINE Vec<double> exp_nonpositive(Vec<double> v) {
  return map(v, [](double lane) { return std::exp(lane); });
}

// 1 / (1 + exp(-v)) and 1 / (1 + exp(v)), both to full relative precision
template <typename V>
struct Logistic {
  V value;
  V complement;
};

template <typename S>
IMAGEN_FAST_INLINE Logistic<Vec<S>> logistic(Vec<S> v) {
  using V = Vec<S>;
  // With e = exp(-|v|) the denominator stays in [1, 2], and nothing overflows.
  const V e = exp_nonpositive(V(0) - abs(v));
  const V larger = reciprocal(V(1) + e);
  const V smaller = e * larger;
  const auto positive = v >= V(0);
  return {select(positive, larger, smaller), select(positive, smaller, larger)};
}

// The standard normal distribution at v: density times sqrt(2 pi), and the probability above |v|
template <typename V>
struct Normal {
  V bell;
  V tail;
};

IMAGEN_FAST_INLINE Normal<Vec<float>> normal(Vec<float> v) {
  using V = Vec<float>;
  const V u = min(abs(v), V(16.0f));
  const V bell = exp_nonpositive(u * u * V(-0.5f));
  // tail = bell * erfcx(u / sqrt(2)) / 2, where the second factor is r times a polynomial in r = 1 / (1 + 0.3 u),
  // minimax to 4e-9 on [0, 15]; beyond, bell is 0
  const V r = reciprocal(fma(u, V(0.3f), V(1.0f)));
  V p = V(-0.020628643116247385f);
  p = fma(p, r, V(0.11246469565927561f));
  p = fma(p, r, V(-0.22828456203656244f));
  p = fma(p, r, V(0.1918829965402786f));
  p = fma(p, r, V(-0.07950892766442409f));
  p = fma(p, r, V(0.09620480405755216f));
  p = fma(p, r, V(0.0783722600630743f));
  p = fma(p, r, V(0.11023933990931134f));
  p = fma(p, r, V(0.11957131821005876f));
  p = fma(p, r, V(0.1196867166449397f));
  return {bell, bell * (p * r)};
}

IMAGEN_FAST_INLINE Normal<Vec<double>> normal(Vec<double> v) {
  return {exp_nonpositive(v * v * Vec<double>(-0.5)),
          map(v, [](double lane) { return 0.5 * std::erfc(std::fabs(lane) * M_SQRT1_2); })};
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
