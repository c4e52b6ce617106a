// Vec<S> on the compiler's own vector types (GCC, Clang): correct everywhere, and what Vec<double> is on every machine.
#pragma once

#include <cmath>

namespace imagen_fast::IMAGEN_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// (GCC ignores the attribute on a type that depends on a template parameter.)
template <typename S>
struct RawVector;
template <>
struct RawVector<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct RawVector<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};

template <typename S>
struct Vec {
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(S));
  using Raw = typename RawVector<S>::type;
  using Mask = decltype(Raw{} < Raw{});

  Raw raw;

  Vec() = default;
  Vec(S value) : raw(Raw{} + value) {}
  explicit Vec(Raw value) : raw(value) {}

  template <typename T>
  static Vec load(const T* from, AllLanes) {
    return load(from, FirstLanes{kWidth});
  }

  template <typename T>
  static Vec load(const T* from, FirstLanes lanes) {
    S lane[kWidth] = {};
    for (int i = 0; i < lanes.count; ++i) lane[i] = widen(from[i]);
    return Vec(bit_cast<Raw>(lane));
  }

  template <typename T>
  void store(T* to, AllLanes) const {
    store(to, FirstLanes{kWidth});
  }

  template <typename T>
  void store(T* to, FirstLanes lanes) const {
    for (int i = 0; i < lanes.count; ++i) narrow(raw[i], to + i);
  }

  friend Vec operator+(Vec a, Vec b) { return Vec(a.raw + b.raw); }
  friend Vec operator-(Vec a, Vec b) { return Vec(a.raw - b.raw); }
  friend Vec operator*(Vec a, Vec b) { return Vec(a.raw * b.raw); }
  friend Vec operator/(Vec a, Vec b) { return Vec(a.raw / b.raw); }
  friend Mask operator>=(Vec a, Vec b) { return a.raw >= b.raw; }
};

template <typename S>
using VecMask = typename Vec<S>::Mask;

// a * b + c, rounded once where the machine has an instruction for it
template <typename S>
IMAGEN_FAST_INLINE Vec<S> fma(Vec<S> a, Vec<S> b, Vec<S> c) {
#ifdef __FP_FAST_FMAF
  for (int i = 0; i < Vec<S>::kWidth; ++i) c.raw[i] = std::fma(a.raw[i], b.raw[i], c.raw[i]);
  return c;
#else
  return a * b + c;
#endif
}

template <typename S>
IMAGEN_FAST_INLINE Vec<S> select(VecMask<S> mask, Vec<S> yes, Vec<S> no) {
  return Vec<S>(mask ? yes.raw : no.raw);
}

// b where a is NaN, as the x86 instructions have it
template <typename S>
IMAGEN_FAST_INLINE Vec<S> max(Vec<S> a, Vec<S> b) {
  return Vec<S>(a.raw > b.raw ? a.raw : b.raw);
}

template <typename S>
IMAGEN_FAST_INLINE Vec<S> min(Vec<S> a, Vec<S> b) {
  return Vec<S>(a.raw < b.raw ? a.raw : b.raw);
}

template <typename S>
IMAGEN_FAST_INLINE Vec<S> abs(Vec<S> a) {
  return Vec<S>(a.raw < 0 ? -a.raw : a.raw);
}

// 1 / a for a normal, finite a, to 2 ulp
template <typename S>
IMAGEN_FAST_INLINE Vec<S> reciprocal(Vec<S> a) {
  return Vec<S>(1) / a;
}

// The nearest integer, for a float |a| < 2^22
template <typename S>
IMAGEN_FAST_INLINE Vec<S> round(Vec<S> a) {
  const Vec<S> magic(0x1.8p23f);
  return (a + magic) - magic;
}

// a * 2^n for floats, an integral n in [-252, 252]; underflows gradually
template <typename S>
IMAGEN_FAST_INLINE Vec<S> scale_exponent(Vec<S> a, Vec<S> n) {
  static_assert(sizeof(S) == sizeof(int32_t));
  // Twice 2^(n/2): one factor alone could not be represented.
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  const Integers exponent = __builtin_convertvector(n.raw, Integers);
  const Integers half = exponent >> 1;
  const Integers first = (half + 127) << 23;
  const Integers second = (exponent - half + 127) << 23;
  using Raw = typename Vec<S>::Raw;
  return Vec<S>(a.raw * bit_cast<Raw>(first) * bit_cast<Raw>(second));
}

template <typename S>
IMAGEN_FAST_INLINE Vec<S> keep(Vec<S> a, AllLanes) {
  return a;
}

// Zero outside the lanes
template <typename S>
IMAGEN_FAST_INLINE Vec<S> keep(Vec<S> a, FirstLanes lanes) {
  for (int i = lanes.count; i < Vec<S>::kWidth; ++i) a.raw[i] = 0;
  return a;
}

template <typename S>
IMAGEN_FAST_INLINE S sum(Vec<S> a) {
  S total = a.raw[0];
  for (int i = 1; i < Vec<S>::kWidth; ++i) total += a.raw[i];
  return total;
}

// function(lane) for every lane
template <typename S, typename Function>
IMAGEN_FAST_INLINE Vec<S> map(Vec<S> a, Function function) {
  for (int i = 0; i < Vec<S>::kWidth; ++i) a.raw[i] = function(a.raw[i]);
  return a;
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
