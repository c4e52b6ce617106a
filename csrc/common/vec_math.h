// exp, the logistic function and the normal distribution on Vec<S> and Wide<S>: floats by polynomials to a few ulp,
// doubles by the C library. Infinities and NaNs come out as from the C library.
//
// Their first template argument is the type that the result will be rounded to. For bf16, which keeps 8 bits, they stop
// at 13; eager PyTorch rounds to 8 between any two operations.
#pragma once

#include <type_traits>

#include "vec.h"

namespace imagen_fast::IMAGEN_FAST_ISA {

template <typename V>
constexpr bool kIsFloat = std::is_same_v<typename V::Scalar, float>;

template <typename T>
constexpr bool kRoughly = std::is_same_v<T, BFloat16>;

// a / b for a normal b, which is infinite only where kOverflowsToInfinity.
template <typename T, typename V>
IMAGEN_FAST_INLINE V divide_for(V a, V b) {
  if constexpr (kRoughly<T>) {
    return divide_roughly(a, b);
  } else {
    return divide(a, b);
  }
}

constexpr float kLog2E = 0x1.715476p0f;

// 2^(v * factor), with a table
template <typename V>
IMAGEN_FAST_INLINE V power_of_two_by_table(V v, float factor) {
  if constexpr (V::kVectors > 2) {
    // Beside all that is constant, the registers hold two in step and no more.
    return {power_of_two_by_table(v.first, factor), power_of_two_by_table(v.second, factor)};
  } else {
    // 2^r = 1 + r p for |r| <= 1/64, minimax to 5e-8
    const auto [power, r, n] = table_of_powers(v * V(factor));
    const V p = fma(V(0.24022650718688965f), r, V(0.69315734505653381f));
    return times_power_of_two(fma(power, p * r, power), n);
  }
}

// 2^(v * factor), with 2^r for |r| <= 1/2, minimax to 8e-5 or 2e-9. (Horner needs the fewest registers; a Wide fills
// its waits.)
template <typename T, typename V>
IMAGEN_FAST_INLINE V power_of_two_by_polynomial(V v, float factor) {
  const auto [r, n] = split_product(v, V(factor));
  V p;
  if constexpr (kRoughly<T>) {
    p = fma(V(0.05517166852951050f), r, V(0.2426111251115799f));
    p = fma(p, r, V(0.6932609677314758f));
    p = fma(p, r, V(0.9999280571937561f));
  } else {
    p = fma(V(0.00015345697465818375f), r, V(0.0013400063617154956f));
    p = fma(p, r, V(0.009618490003049374f));
    p = fma(p, r, V(0.05550328269600868f));
    p = fma(p, r, V(0.24022646248340607f));
    p = fma(p, r, V(0.6931471824645996f));
    p = fma(p, r, V(1.0f));
  }
  return times_power_of_two(p, n);
}

// 2^(v * factor), of floats; may be 0 where it would not be normal. The product must not be positive, except where
// kOverflowsToInfinity.
template <typename T, typename V>
IMAGEN_FAST_INLINE V power_of_two(V v, float factor) {
  if constexpr (kHasTableOfPowers<V> && !kRoughly<T>) {
    return power_of_two_by_table(v, factor);
  } else {
    return power_of_two_by_polynomial<T>(v, factor);
  }
}

// exp(v) for v <= 0; may be 0 where a float of it would not be normal
template <typename T, typename V>
IMAGEN_FAST_INLINE V exp_nonpositive(V v) {
  if constexpr (kIsFloat<V>) {
    return power_of_two<T>(v, kLog2E);
  } else {
    return map(v, [](double lane) { return std::exp(lane); });
  }
}

// exp(v); 0 and infinity where a float of it, or of its reciprocal, would not be normal
template <typename T, typename V>
IMAGEN_FAST_INLINE V exp(V v) {
  if constexpr (kIsFloat<V>) {
    const V e = exp_nonpositive<T>(negative_abs(v));
    const V reciprocal = select(e < V(0x1p-125f), V(INFINITY), divide(V(1), e));
    return select(v >= V(0), reciprocal, select(v < V(0), e, v));  // v is NaN where it is neither
  } else {
    return map(v, [](double lane) { return std::exp(lane); });
  }
}

// exp(-|v|), of which the functions of exp(v) and exp(-v) below are made, so that nothing overflows
template <typename T, typename V>
IMAGEN_FAST_INLINE V exp_negative_abs(V v) {
  return exp_nonpositive<T>(negative_abs(v));
}

// 1 / (1 + exp(-v)) and 1 / (1 + exp(v)), both to full relative precision
template <typename V>
struct Logistic {
  V value;
  V complement;
};

template <typename T, typename V>
IMAGEN_FAST_INLINE Logistic<V> logistic(V v) {
  const V e = exp_negative_abs<T>(v);
  const V larger = divide_for<T>(V(1), V(1) + e);
  const V smaller = e * larger;
  const auto positive = v >= V(0);
  return {select(positive, larger, smaller), select(positive, smaller, larger)};
}

// a / (1 + exp(-v))
template <typename T, typename V>
IMAGEN_FAST_INLINE V times_logistic(V a, V v) {
  if constexpr (kOverflowsToInfinity<V>) {
    return divide_for<T>(a, V(1) + power_of_two<T>(v, -kLog2E));
  } else {
    const V e = exp_negative_abs<T>(v);
    return divide_for<T>(multiply_where(v < V(0), a, e), V(1) + e);
  }
}

// The standard normal distribution at v: density times sqrt(2 pi), and the probability above |v|
template <typename V>
struct Normal {
  V bell;
  V tail;
};

template <typename T, typename V>
IMAGEN_FAST_INLINE Normal<V> normal(V v) {
  if constexpr (kIsFloat<V>) {
    const V u = min(abs(v), V(16.0f));
    const V bell = exp_nonpositive<T>(u * u * V(-0.5f));
    // tail = bell * erfcx(u / sqrt(2)) / 2, where the second factor is r times a polynomial in r = 1 / (1 + 0.3 u),
    // minimax to 4e-9 on [0, 15]; beyond, bell is 0
    const V r = divide_for<T>(V(1.0f), fma(u, V(0.3f), V(1.0f)));
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
  } else {
    return {exp_nonpositive<T>(v * v * V(-0.5)),
            map(v, [](double lane) { return 0.5 * std::erfc(std::fabs(lane) * M_SQRT1_2); })};
  }
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
