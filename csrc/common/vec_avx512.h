// Vec<float> for AVX-512 (F, BW, VL, DQ), with the bf16 conversion where the object is compiled for it.
#pragma once

#include <immintrin.h>

namespace imagen_fast::IMAGEN_FAST_ISA {

IMAGEN_FAST_INLINE __mmask16 lane_mask(AllLanes) { return 0xffff; }
IMAGEN_FAST_INLINE __mmask16 lane_mask(FirstLanes lanes) { return static_cast<__mmask16>((1u << lanes.count) - 1); }

IMAGEN_FAST_INLINE __m512 bf16_to_float(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

IMAGEN_FAST_INLINE __m256i float_to_bf16(__m512 value) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

template <>
struct Vec<float> {
  static constexpr int kWidth = 16;
  using Mask = __mmask16;

  __m512 raw;

  Vec() = default;
  IMAGEN_FAST_INLINE Vec(float value) : raw(_mm512_set1_ps(value)) {}
  IMAGEN_FAST_INLINE explicit Vec(__m512 value) : raw(value) {}

  static IMAGEN_FAST_INLINE Vec load(const float* from, AllLanes) { return Vec(_mm512_loadu_ps(from)); }
  static IMAGEN_FAST_INLINE Vec load(const float* from, FirstLanes lanes) {
    return Vec(_mm512_maskz_loadu_ps(lane_mask(lanes), from));
  }
  static IMAGEN_FAST_INLINE Vec load(const BFloat16* from, AllLanes) {
    return Vec(bf16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
  static IMAGEN_FAST_INLINE Vec load(const BFloat16* from, FirstLanes lanes) {
    return Vec(bf16_to_float(_mm256_maskz_loadu_epi16(lane_mask(lanes), from)));
  }
  static IMAGEN_FAST_INLINE Vec load(const Half* from, AllLanes) {
    return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
  static IMAGEN_FAST_INLINE Vec load(const Half* from, FirstLanes lanes) {
    return Vec(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(lanes), from)));
  }

  template <typename Lanes>
  IMAGEN_FAST_INLINE void store(float* to, Lanes lanes) const {
    _mm512_mask_storeu_ps(to, lane_mask(lanes), raw);
  }
  template <typename Lanes>
  IMAGEN_FAST_INLINE void store(BFloat16* to, Lanes lanes) const {
    _mm256_mask_storeu_epi16(to, lane_mask(lanes), float_to_bf16(raw));
  }
  template <typename Lanes>
  IMAGEN_FAST_INLINE void store(Half* to, Lanes lanes) const {
    constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_mask_storeu_epi16(to, lane_mask(lanes), _mm512_cvtps_ph(raw, kRounding));
  }

  friend IMAGEN_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator/(Vec a, Vec b) { return Vec(_mm512_div_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Mask operator>=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_GE_OQ); }
};

IMAGEN_FAST_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>(_mm512_fmadd_ps(a.raw, b.raw, c.raw));
}

IMAGEN_FAST_INLINE Vec<float> select(__mmask16 mask, Vec<float> yes, Vec<float> no) {
  return Vec<float>(_mm512_mask_blend_ps(mask, no.raw, yes.raw));
}

IMAGEN_FAST_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm512_max_ps(a.raw, b.raw));
}

IMAGEN_FAST_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm512_min_ps(a.raw, b.raw));
}

IMAGEN_FAST_INLINE Vec<float> abs(Vec<float> a) {
  return Vec<float>(_mm512_abs_ps(a.raw));
}

IMAGEN_FAST_INLINE Vec<float> reciprocal(Vec<float> a) {
  // 14 bits, and one Newton step for the rest; a division takes two to three times as long.
  const Vec<float> estimate(_mm512_rcp14_ps(a.raw));
  return estimate * Vec<float>(_mm512_fnmadd_ps(a.raw, estimate.raw, _mm512_set1_ps(2.0f)));
}

IMAGEN_FAST_INLINE Vec<float> round(Vec<float> a) {
  return Vec<float>(_mm512_roundscale_ps(a.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

IMAGEN_FAST_INLINE Vec<float> scale_exponent(Vec<float> a, Vec<float> n) {
  return Vec<float>(_mm512_scalef_ps(a.raw, n.raw));
}

IMAGEN_FAST_INLINE Vec<float> keep(Vec<float> a, FirstLanes lanes) {
  return Vec<float>(_mm512_maskz_mov_ps(lane_mask(lanes), a.raw));
}

IMAGEN_FAST_INLINE float sum(Vec<float> a) {
  return _mm512_reduce_add_ps(a.raw);
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
