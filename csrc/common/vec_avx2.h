// Vec<float> for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace imagen_fast::IMAGEN_FAST_ISA {

// All bits set in the first lanes
IMAGEN_FAST_INLINE __m256i first_mask(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

IMAGEN_FAST_INLINE __m128i load_8x16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
IMAGEN_FAST_INLINE __m128i load_first_8x16(const void* from, int count) {
  if (count == 8) return load_8x16(from);
  uint16_t lane[8] = {};
  std::memcpy(lane, from, count * sizeof(uint16_t));
  return load_8x16(lane);
}

IMAGEN_FAST_INLINE void store_8x16(void* to, __m128i bits) { _mm_storeu_si128(static_cast<__m128i*>(to), bits); }
IMAGEN_FAST_INLINE void store_first_8x16(void* to, __m128i bits, int count) {
  if (count == 8) return store_8x16(to, bits);
  std::memcpy(to, &bits, count * sizeof(uint16_t));
}

IMAGEN_FAST_INLINE __m256 bf16_to_float(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

IMAGEN_FAST_INLINE __m128i float_to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

IMAGEN_FAST_INLINE __m128i float_to_half(__m256 value) {
  return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <>
struct Vec<float> {
  using Scalar = float;
  using Mask = __m256;
  static constexpr int kVectors = 1;
  static constexpr int kWidth = 8;

  // Added to a float, it leaves no bits for a fraction, and the integer in the low ones.
  static constexpr float kNoFraction = 0x1.8p23f;

  __m256 raw;

  Vec() = default;
  IMAGEN_FAST_INLINE Vec(float value) : raw(_mm256_set1_ps(value)) {}
  IMAGEN_FAST_INLINE explicit Vec(__m256 value) : raw(value) {}

  static IMAGEN_FAST_INLINE Vec load(const float* from) { return Vec(_mm256_loadu_ps(from)); }
  static IMAGEN_FAST_INLINE Vec load(const BFloat16* from) { return Vec(bf16_to_float(load_8x16(from))); }
  static IMAGEN_FAST_INLINE Vec load(const Half* from) { return Vec(_mm256_cvtph_ps(load_8x16(from))); }

  static IMAGEN_FAST_INLINE Vec load_first(const float* from, int count) {
    return Vec(_mm256_maskload_ps(from, first_mask(count)));
  }
  static IMAGEN_FAST_INLINE Vec load_first(const BFloat16* from, int count) {
    return Vec(bf16_to_float(load_first_8x16(from, count)));
  }
  static IMAGEN_FAST_INLINE Vec load_first(const Half* from, int count) {
    return Vec(_mm256_cvtph_ps(load_first_8x16(from, count)));
  }

  IMAGEN_FAST_INLINE void store(float* to) const { _mm256_storeu_ps(to, raw); }
  IMAGEN_FAST_INLINE void store(BFloat16* to) const { store_8x16(to, float_to_bf16(raw)); }
  IMAGEN_FAST_INLINE void store(Half* to) const { store_8x16(to, float_to_half(raw)); }

  IMAGEN_FAST_INLINE void store_first(float* to, int count) const { _mm256_maskstore_ps(to, first_mask(count), raw); }
  IMAGEN_FAST_INLINE void store_first(BFloat16* to, int count) const {
    store_first_8x16(to, float_to_bf16(raw), count);
  }
  IMAGEN_FAST_INLINE void store_first(Half* to, int count) const { store_first_8x16(to, float_to_half(raw), count); }

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

  friend IMAGEN_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Mask operator>=(Vec a, Vec b) { return _mm256_cmp_ps(a.raw, b.raw, _CMP_GE_OQ); }
  friend IMAGEN_FAST_INLINE Mask operator<(Vec a, Vec b) { return _mm256_cmp_ps(a.raw, b.raw, _CMP_LT_OQ); }
  friend IMAGEN_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.raw, b.raw, c.raw)); }
  friend IMAGEN_FAST_INLINE Vec fms(Vec a, Vec b, Vec c) { return Vec(_mm256_fmsub_ps(a.raw, b.raw, c.raw)); }
  friend IMAGEN_FAST_INLINE Vec select(Mask mask, Vec yes, Vec no) {
    return Vec(_mm256_blendv_ps(no.raw, yes.raw, mask));
  }
  friend IMAGEN_FAST_INLINE Vec multiply_where(Mask mask, Vec a, Vec b) { return select(mask, a * b, a); }
  friend IMAGEN_FAST_INLINE Vec min(Vec a, Vec b) { return Vec(_mm256_min_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec max(Vec a, Vec b) { return Vec(_mm256_max_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec abs(Vec a) { return Vec(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.raw)); }
  friend IMAGEN_FAST_INLINE Vec negative_abs(Vec a) { return Vec(_mm256_or_ps(_mm256_set1_ps(-0.0f), a.raw)); }
  friend IMAGEN_FAST_INLINE Vec divide(Vec a, Vec b) { return Vec(_mm256_div_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec divide_roughly(Vec a, Vec b) { return divide(a, b); }
  friend IMAGEN_FAST_INLINE Split<Vec> split_product(Vec a, Vec b) {
    const Vec integer = fma(a, b, kNoFraction);
    return {fms(a, b, integer - kNoFraction), integer};
  }
  friend IMAGEN_FAST_INLINE Vec times_power_of_two(Vec a, Vec n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n.raw), 23);
    const __m256 shifted = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.raw), exponent));
    return Vec(_mm256_and_ps(shifted, n >= kNoFraction - 125));
  }
  friend IMAGEN_FAST_INLINE Vec keep_first(Vec a, int count) {
    return Vec(_mm256_and_ps(a.raw, _mm256_castsi256_ps(first_mask(count))));
  }
  friend IMAGEN_FAST_INLINE float sum(Vec a) {
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(a.raw), _mm256_extractf128_ps(a.raw, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  friend IMAGEN_FAST_INLINE float largest(Vec a) {
    const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(a.raw), _mm256_extractf128_ps(a.raw, 1));
    const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
  }
};

}  // namespace imagen_fast::IMAGEN_FAST_ISA
