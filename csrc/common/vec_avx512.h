// Vec<float> for AVX-512 (F, BW, VL, DQ), with the bf16 conversion where the object is compiled for it.
#pragma once

#include <immintrin.h>

namespace imagen_fast::IMAGEN_FAST_ISA {

IMAGEN_FAST_INLINE __mmask16 first_mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }

// Lane i is the upper half of a float, its lower half zero: one instruction, where widening and shifting are two.
IMAGEN_FAST_INLINE __m512 bf16_to_float(__m256i bits) {
  const __m512i from = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3,
                                        0, 2, 0, 1, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, _mm512_castsi256_si512(bits)));
}

IMAGEN_FAST_INLINE __m256i float_to_bf16(__m512 value) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(high);
#endif
}

IMAGEN_FAST_INLINE __m256i float_to_half(__m512 value) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 2^(i/32)
alignas(64) inline constexpr float kPowers[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
    0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
    0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f,
    0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f,
    0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};

template <>
struct Vec<float> {
  using Scalar = float;
  using Mask = __mmask16;
  static constexpr int kVectors = 1;
  static constexpr int kWidth = 16;

  __m512 raw;

  Vec() = default;
  IMAGEN_FAST_INLINE Vec(float value) : raw(_mm512_set1_ps(value)) {}
  IMAGEN_FAST_INLINE explicit Vec(__m512 value) : raw(value) {}

  static IMAGEN_FAST_INLINE Vec load(const float* from) { return Vec(_mm512_loadu_ps(from)); }
  static IMAGEN_FAST_INLINE Vec load(const BFloat16* from) {
    return Vec(bf16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
  static IMAGEN_FAST_INLINE Vec load(const Half* from) {
    return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }

  static IMAGEN_FAST_INLINE Vec load_first(const float* from, int count) {
    return Vec(_mm512_maskz_loadu_ps(first_mask(count), from));
  }
  static IMAGEN_FAST_INLINE Vec load_first(const BFloat16* from, int count) {
    return Vec(bf16_to_float(_mm256_maskz_loadu_epi16(first_mask(count), from)));
  }
  static IMAGEN_FAST_INLINE Vec load_first(const Half* from, int count) {
    return Vec(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_mask(count), from)));
  }

  IMAGEN_FAST_INLINE void store(float* to) const { _mm512_storeu_ps(to, raw); }
  IMAGEN_FAST_INLINE void store(BFloat16* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), float_to_bf16(raw));
  }
  IMAGEN_FAST_INLINE void store(Half* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), float_to_half(raw));
  }

  IMAGEN_FAST_INLINE void store_first(float* to, int count) const { _mm512_mask_storeu_ps(to, first_mask(count), raw); }
  IMAGEN_FAST_INLINE void store_first(BFloat16* to, int count) const {
    _mm256_mask_storeu_epi16(to, first_mask(count), float_to_bf16(raw));
  }
  IMAGEN_FAST_INLINE void store_first(Half* to, int count) const {
    _mm256_mask_storeu_epi16(to, first_mask(count), float_to_half(raw));
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

  friend IMAGEN_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Mask operator>=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_GE_OQ); }
  friend IMAGEN_FAST_INLINE Mask operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_LT_OQ); }
  friend IMAGEN_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.raw, b.raw, c.raw)); }
  friend IMAGEN_FAST_INLINE Vec fms(Vec a, Vec b, Vec c) { return Vec(_mm512_fmsub_ps(a.raw, b.raw, c.raw)); }
  friend IMAGEN_FAST_INLINE Vec select(Mask mask, Vec yes, Vec no) {
    return Vec(_mm512_mask_blend_ps(mask, no.raw, yes.raw));
  }
  friend IMAGEN_FAST_INLINE Vec multiply_where(Mask mask, Vec a, Vec b) {
    return Vec(_mm512_mask_mul_ps(a.raw, mask, a.raw, b.raw));
  }
  friend IMAGEN_FAST_INLINE Vec min(Vec a, Vec b) { return Vec(_mm512_min_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec max(Vec a, Vec b) { return Vec(_mm512_max_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec abs(Vec a) { return Vec(_mm512_abs_ps(a.raw)); }
  friend IMAGEN_FAST_INLINE Vec negative_abs(Vec a) { return Vec(_mm512_or_ps(a.raw, _mm512_set1_ps(-0.0f))); }
  // Beside other work that beats a Newton step from 14 bits of 1 / b, whose constants and products take more room.
  friend IMAGEN_FAST_INLINE Vec divide(Vec a, Vec b) { return Vec(_mm512_div_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec divide_roughly(Vec a, Vec b) {
    return Vec(_mm512_mul_ps(a.raw, _mm512_rcp14_ps(b.raw)));
  }
  // An infinity is split into 0 and itself; 2^-inf is 0, 2^inf infinite.
  friend IMAGEN_FAST_INLINE Split<Vec> split_product(Vec a, Vec b) {
    const Vec product = a * b;
    const Vec fraction(_mm512_reduce_ps(product.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return {fraction, product - fraction};
  }
  // Of two registers, since a polynomial to that many bits would keep the multipliers busy for longer than all the
  // rest.
  friend IMAGEN_FAST_INLINE TableOfPowers<Vec> table_of_powers(Vec a) {
    const __m512 shift = _mm512_set1_ps(0x1.8p18f);  // where floats are 1/32 apart
    const __m512 shifted = _mm512_add_ps(a.raw, shift);
    const __m512 n = _mm512_sub_ps(shifted, shift);
    const __m512 power =
        _mm512_permutex2var_ps(_mm512_load_ps(kPowers), _mm512_castps_si512(shifted), _mm512_load_ps(kPowers + 16));
    // Where a is so large that r would be, or infinite, n alone decides, and 1 is small enough; a NaN stays in n.
    const __m512 r = _mm512_range_ps(_mm512_sub_ps(a.raw, n), _mm512_set1_ps(1.0f), 2);  // the smaller magnitude
    return {Vec(power), Vec(r), Vec(n)};
  }
  friend IMAGEN_FAST_INLINE Vec times_power_of_two(Vec a, Vec n) { return Vec(_mm512_scalef_ps(a.raw, n.raw)); }
  friend IMAGEN_FAST_INLINE Vec keep_first(Vec a, int count) {
    return Vec(_mm512_maskz_mov_ps(first_mask(count), a.raw));
  }
  friend IMAGEN_FAST_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.raw); }
  friend IMAGEN_FAST_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.raw); }
};

template <>
constexpr bool kOverflowsToInfinity<Vec<float>> = true;
template <>
constexpr bool kHasTableOfPowers<Vec<float>> = true;

#ifdef __AVX512BF16__
// Both are rounded by one instruction, which takes little longer than for one.
IMAGEN_FAST_INLINE void store_two(Vec<float> a, Vec<float> b, BFloat16* to_a, BFloat16* to_b) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b.raw, a.raw);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_a), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_b), _mm512_extracti64x4_epi64(both, 1));
}
IMAGEN_FAST_INLINE void store_two(Vec<float> a, Vec<float> b, BFloat16* to) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b.raw, a.raw));
}
#endif

}  // namespace imagen_fast::IMAGEN_FAST_ISA
