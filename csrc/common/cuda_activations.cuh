// The activations and their derivatives in kernels, from fp32 to fp32. T is the type that the result will be rounded
// to: for the 16-bit ones the exponential is the special function unit's, whose error of 2^-22 (times the exponent)
// disappears in the rounding. At -inf all of them give NaN, as PyTorch's do.
#pragma once

#include "activation_codes.h"
#include "cuda.cuh"

namespace imagen_fast {

template <typename T>
__device__ __forceinline__ float exp_for(float v) {
  if constexpr (sizeof(T) == 2) {
    return fast_exp2(v * 1.4426950408889634f);
  } else {
    return expf(v);
  }
}

// 1 / (1 + exp(-v)) and 1 / (1 + exp(v)), both to full relative precision
struct Logistic {
  float value;
  float complement;
};

template <typename T>
__device__ __forceinline__ Logistic logistic(float v) {
  const float e = exp_for<T>(-fabsf(v));
  const float larger = fast_rcp(1.0f + e);
  const float smaller = e * larger;
  return v >= 0.0f ? Logistic{larger, smaller} : Logistic{smaller, larger};
}

// The standard normal distribution at v: its density times sqrt(2 pi), and the probability below v
struct Normal {
  float bell;
  float below;
};

template <typename T>
__device__ __forceinline__ Normal normal(float v) {
  const float u = fabsf(v) > 16.0f ? 16.0f : fabsf(v);  // NaN stays NaN
  const float bell = exp_for<T>(-0.5f * u * u);
  // The probability above u is bell * erfcx(u / sqrt(2)) / 2, where the second factor is r times a polynomial in
  // r = 1 / (1 + 0.3 u), minimax to 1e-5 (for 16 bits) or 4e-9 on [0, 15]; beyond, bell is 0.
  const float r = fast_rcp(fmaf(u, 0.3f, 1.0f));
  float p;
  if constexpr (sizeof(T) == 2) {
    p = fmaf(-0.0763187035918235f, r, 0.2137104719877243f);
    p = fmaf(p, r, -0.0143102891743183f);
    p = fmaf(p, r, 0.1427888870239258f);
    p = fmaf(p, r, 0.1140926033258438f);
    p = fmaf(p, r, 0.1200418099761009f);
  } else {
    p = fmaf(-0.020628643116247385f, r, 0.11246469565927561f);
    p = fmaf(p, r, -0.22828456203656244f);
    p = fmaf(p, r, 0.1918829965402786f);
    p = fmaf(p, r, -0.07950892766442409f);
    p = fmaf(p, r, 0.09620480405755216f);
    p = fmaf(p, r, 0.0783722600630743f);
    p = fmaf(p, r, 0.11023933990931134f);
    p = fmaf(p, r, 0.11957131821005876f);
    p = fmaf(p, r, 0.1196867166449397f);
  }
  const float above = bell * (p * r);
  return {bell, v >= 0.0f ? 1.0f - above : above};
}

template <typename T>
struct Identity {
  static __device__ __forceinline__ float value(float t) { return t; }
  static __device__ __forceinline__ float slope(float) { return 1.0f; }
};

// t * logistic(t)
template <typename T>
struct Silu {
  // Where exp(-t) overflows the quotient is 0.
  static __device__ __forceinline__ float value(float t) { return t * fast_rcp(1.0f + exp_for<T>(-t)); }
  static __device__ __forceinline__ float slope(float t) {
    const Logistic l = logistic<T>(t);
    return l.value * fmaf(t, l.complement, 1.0f);
  }
};

// t * P(t), P the standard normal distribution
template <typename T>
struct Gelu {
  static __device__ __forceinline__ float value(float t) { return t * normal<T>(t).below; }
  static __device__ __forceinline__ float slope(float t) {
    const Normal n = normal<T>(t);
    return fmaf(t * 0.3989422804014327f, n.bell, n.below);
  }
};

// t * (1 + tanh(k)) / 2 = t * logistic(2 k), k = sqrt(2 / pi) (t + 0.044715 t^3)
template <typename T>
struct GeluTanh {
  static constexpr float kFactor = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f * kFactor;

  static __device__ __forceinline__ float value(float t) { return t * fast_rcp(1.0f + exp_for<T>(-twice_k(t))); }
  static __device__ __forceinline__ float slope(float t) {
    const Logistic l = logistic<T>(twice_k(t));
    const float product = l.value * l.complement;
    // Where the product is 0 the square may be infinite.
    const float bend = product == 0.0f ? 0.0f : t * product * fmaf(t * t, 3.0f * kCubic, kFactor);
    return bend + l.value;
  }

 private:
  static __device__ __forceinline__ float twice_k(float t) { return t * fmaf(t * t, kCubic, kFactor); }
};

// Any of them, chosen at every call: less code, for kernels that are not worth a copy for each
template <typename T>
struct AnyActivation {
  Activation code;

  __device__ __forceinline__ float value(float t) const {
    switch (code) {
      case Activation::kSilu: return Silu<T>::value(t);
      case Activation::kGelu: return Gelu<T>::value(t);
      case Activation::kGeluTanh: return GeluTanh<T>::value(t);
      default: return t;
    }
  }
  __device__ __forceinline__ float slope(float t) const {
    switch (code) {
      case Activation::kSilu: return Silu<T>::slope(t);
      case Activation::kGelu: return Gelu<T>::slope(t);
      case Activation::kGeluTanh: return GeluTanh<T>::slope(t);
      default: return 1.0f;
    }
  }
};

// Calls function(activation) with the activation of this code: with a copy of `function` for each, or one for all.
template <typename T, bool kCopies = true, typename Function>
__device__ __forceinline__ void with_activation(Activation code, Function function) {
  if constexpr (!kCopies) {
    function(AnyActivation<T>{code});
  } else {
    switch (code) {
      case Activation::kSilu: return function(Silu<T>());
      case Activation::kGelu: return function(Gelu<T>());
      case Activation::kGeluTanh: return function(GeluTanh<T>());
      default: return function(Identity<T>());
    }
  }
}

}  // namespace imagen_fast
