// The activations and their derivatives, on Vec<S>. T is the type that the result will be rounded to. At -inf all
// of them give NaN, as PyTorch's do.
#pragma once

#include "activation_codes.h"
#include "vec_math.h"

namespace imagen_fast::IMAGEN_FAST_ISA {

struct Identity {
  template <typename T, typename V>
  static IMAGEN_FAST_INLINE V value(V t) {
    return t;
  }
  template <typename T, typename V>
  static IMAGEN_FAST_INLINE V slope(V) {
    return V(1);
  }
};

// t * logistic(t)
struct Silu {
  template <typename T, typename V>
  static IMAGEN_FAST_INLINE V value(V t) {
    return times_logistic<T>(t, t);
  }
  template <typename T, typename V>
  static IMAGEN_FAST_INLINE V slope(V t) {
    const auto l = logistic<T>(t);
    return l.value * fma(t, l.complement, V(1));
  }
};

// t * P(t), P the standard normal distribution
struct Gelu {
  template <typename V>
  static IMAGEN_FAST_INLINE V probability_below(V t, V tail) {
    return select(t >= V(0), V(1) - tail, tail);
  }
  template <typename T, typename V>
  static IMAGEN_FAST_INLINE V value(V t) {
    return t * probability_below(t, normal<T>(t).tail);
  }
  template <typename T, typename V>
  static IMAGEN_FAST_INLINE V slope(V t) {
    const auto n = normal<T>(t);
    return fma(t * V(0.3989422804014327), n.bell, probability_below(t, n.tail));
  }
};

// t * (1 + tanh(k)) / 2 = t * logistic(2 k), k = sqrt(2 / pi) (t + 0.044715 t^3)
struct GeluTanh {
  static constexpr double kFactor = 1.5957691216057308;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.044715;

  template <typename T, typename V>
  static IMAGEN_FAST_INLINE V value(V t) {
    return times_logistic<T>(t, twice_k(t));
  }
  template <typename T, typename V>
  static IMAGEN_FAST_INLINE V slope(V t) {
    const auto l = logistic<T>(twice_k(t));
    const V twice_k_slope = fma(t * t, V(3 * kFactor * kCubic), V(kFactor));
    return fma(t * (l.value * l.complement), twice_k_slope, l.value);
  }

 private:
  template <typename V>
  static IMAGEN_FAST_INLINE V twice_k(V t) {
    return t * fma(t * t, V(kFactor * kCubic), V(kFactor));
  }
};

// The slope as of fp32, whatever it is summed with
template <typename Act>
struct Finely {
  template <typename T, typename V>
  static IMAGEN_FAST_INLINE V slope(V t) {
    return Act::template slope<float>(t);
  }
};

// Whether the slope of Act is rough for T.
template <typename T, typename Act>
constexpr bool kHasRoughSlope = kRoughly<T> && !std::is_same_v<Act, Identity>;

}  // namespace imagen_fast::IMAGEN_FAST_ISA
