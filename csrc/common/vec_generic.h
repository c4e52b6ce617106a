// Vec<S> on the compiler's own vector types (GCC, Clang): correct everywhere, and what Vec<double> is on every machine.
#pragma once

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
  using Scalar = S;
  using Raw = typename RawVector<S>::type;
  using Mask = decltype(Raw{} < Raw{});
  static constexpr int kVectors = 1;
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(S));

  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
  // Element by element, compilers do better on an array than on a vector.
  struct Lanes {
    S value[kWidth];
  };

  // Added to a float, it leaves no bits for a fraction, and the integer in the low ones.
  static constexpr S kNoFraction = S(0x1.8p23);

  Raw raw;

  Vec() = default;
  IMAGEN_FAST_INLINE Vec(S value) : raw(Raw{} + value) {}
  IMAGEN_FAST_INLINE explicit Vec(Raw value) : raw(value) {}

  template <typename T>
  static IMAGEN_FAST_INLINE Vec load(const T* from) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      HalfWords bits;
      std::memcpy(&bits, from, sizeof(bits));
      return Vec(bit_cast<Raw>(__builtin_convertvector(bits, Words) << 16));
    } else {
      Lanes lane;
      for (int i = 0; i < kWidth; ++i) lane.value[i] = widen(from[i]);
      return Vec(bit_cast<Raw>(lane));
    }
  }
  template <typename T>
  static IMAGEN_FAST_INLINE Vec load_first(const T* from, int count) {
    Lanes lane = {};
    for (int i = 0; i < count; ++i) lane.value[i] = widen(from[i]);
    return Vec(bit_cast<Raw>(lane));
  }

  template <typename T>
  IMAGEN_FAST_INLINE void store(T* to) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const Words bits = bit_cast<Words>(raw);
      const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
      const HalfWords high = __builtin_convertvector(raw == raw ? rounded : Words{} + 0x7fc0u, HalfWords);
      std::memcpy(to, &high, sizeof(high));
    } else {
      const auto lane = bit_cast<Lanes>(raw);
      for (int i = 0; i < kWidth; ++i) narrow(lane.value[i], to + i);
    }
  }
  template <typename T>
  IMAGEN_FAST_INLINE void store_first(T* to, int count) const {
    for (int i = 0; i < count; ++i) narrow(raw[i], to + i);
  }

  // The ends of the recursion in Twice
  template <typename T>
  static IMAGEN_FAST_INLINE Vec load_rows(const T* from, int64_t) {
    return load(from);
  }
  template <typename T>
  static IMAGEN_FAST_INLINE Vec load_first_of_rows(const T* from, int64_t, int count) {
    return load_first(from, count);
  }
  template <typename T>
  IMAGEN_FAST_INLINE void store_rows(T* to, int64_t) const {
    store(to);
  }
  template <typename T>
  IMAGEN_FAST_INLINE void store_first_of_rows(T* to, int64_t, int count) const {
    store_first(to, count);
  }
  friend IMAGEN_FAST_INLINE Vec sum_of_vectors(Vec a) { return a; }
  friend IMAGEN_FAST_INLINE Vec add_products(Vec a, Vec b, Vec c) { return fma(a, b, c); }

  friend IMAGEN_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.raw + b.raw); }
  friend IMAGEN_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.raw - b.raw); }
  friend IMAGEN_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.raw * b.raw); }
  friend IMAGEN_FAST_INLINE Mask operator>=(Vec a, Vec b) { return a.raw >= b.raw; }
  friend IMAGEN_FAST_INLINE Mask operator<(Vec a, Vec b) { return a.raw < b.raw; }

  // a * b + c, rounded once where the machine has an instruction for it
  friend IMAGEN_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#ifdef __FP_FAST_FMAF
    for (int i = 0; i < kWidth; ++i) c.raw[i] = std::fma(a.raw[i], b.raw[i], c.raw[i]);
    return c;
#else
    return a * b + c;
#endif
  }

  // a * b - c, likewise
  friend IMAGEN_FAST_INLINE Vec fms(Vec a, Vec b, Vec c) { return fma(a, b, Vec(-c.raw)); }

  friend IMAGEN_FAST_INLINE Vec select(Mask mask, Vec yes, Vec no) { return Vec(mask ? yes.raw : no.raw); }

  // a * b under the mask, a elsewhere
  friend IMAGEN_FAST_INLINE Vec multiply_where(Mask mask, Vec a, Vec b) { return select(mask, a * b, a); }

  // b where either is NaN, as the x86 instructions have it
  friend IMAGEN_FAST_INLINE Vec min(Vec a, Vec b) { return Vec(a.raw < b.raw ? a.raw : b.raw); }
  friend IMAGEN_FAST_INLINE Vec max(Vec a, Vec b) { return Vec(a.raw > b.raw ? a.raw : b.raw); }

  friend IMAGEN_FAST_INLINE Vec abs(Vec a) { return Vec(a.raw < 0 ? -a.raw : a.raw); }
  friend IMAGEN_FAST_INLINE Vec negative_abs(Vec a) { return Vec(a.raw < 0 ? a.raw : -a.raw); }

  // a / b for a normal, finite b, to 2 ulp
  friend IMAGEN_FAST_INLINE Vec divide(Vec a, Vec b) { return Vec(a.raw / b.raw); }
  // The same to 12 bits or more
  friend IMAGEN_FAST_INLINE Vec divide_roughly(Vec a, Vec b) { return divide(a, b); }

  // What exp is made of, for floats with a * b < 2^22: a * b, split in one rounding so that nothing is lost near an
  // integer, ...
  friend IMAGEN_FAST_INLINE Split<Vec> split_product(Vec a, Vec b) {
    const Vec integer = fma(a, b, kNoFraction);
    return {fms(a, b, integer - kNoFraction), integer};
  }
  // ... and a * 2^n for a in [1/2, 2], n <= 0; 0 where a float of it would not be normal.
  friend IMAGEN_FAST_INLINE Vec times_power_of_two(Vec a, Vec n) {
    static_assert(sizeof(S) == sizeof(float));
    const Vec shifted(bit_cast<Raw>(bit_cast<Words>(a.raw) + (bit_cast<Words>(n.raw) << 23)));
    return select(n >= kNoFraction - S(125), shifted, Vec(S(0)));
  }

  // Zero in the other lanes
  friend IMAGEN_FAST_INLINE Vec keep_first(Vec a, int count) {
    for (int i = count; i < kWidth; ++i) a.raw[i] = 0;
    return a;
  }

  friend IMAGEN_FAST_INLINE S sum(Vec a) {
    S total = a.raw[0];
    for (int i = 1; i < kWidth; ++i) total += a.raw[i];
    return total;
  }

  // Any of the others if one is NaN
  friend IMAGEN_FAST_INLINE S largest(Vec a) {
    S most = a.raw[0];
    for (int i = 1; i < kWidth; ++i) most = a.raw[i] > most ? a.raw[i] : most;
    return most;
  }

  // function(lane) for every lane
  template <typename Function>
  friend IMAGEN_FAST_INLINE Vec map(Vec a, Function function) {
    for (int i = 0; i < kWidth; ++i) a.raw[i] = function(a.raw[i]);
    return a;
  }
};

}  // namespace imagen_fast::IMAGEN_FAST_ISA
