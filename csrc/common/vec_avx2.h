// Vec<float> for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace imagen_fast::IMAGEN_FAST_ISA {

// All bits set in the first lanes
IMAGEN_FAST_INLINE __m256i lane_mask(FirstLanes lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

IMAGEN_FAST_INLINE __m128i load_16bit(const void* from, AllLanes) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
IMAGEN_FAST_INLINE __m128i load_16bit(const void* from, FirstLanes lanes) {
  uint16_t lane[8] = {};
  std::memcpy(lane, from, lanes.count * sizeof(uint16_t));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lane));
}

IMAGEN_FAST_INLINE void store_16bit(void* to, __m128i bits, AllLanes) {
  _mm_storeu_si128(static_cast<__m128i*>(to), bits);
}
IMAGEN_FAST_INLINE void store_16bit(void* to, __m128i bits, FirstLanes lanes) {
  std::memcpy(to, &bits, lanes.count * sizeof(uint16_t));
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
  // The pack works within 128-bit halves: bring the two quarters together.
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000));
}

template <>
struct Vec<float> {
  static constexpr int kWidth = 8;
  using Mask = __m256;

  __m256 raw;

  Vec() = default;
  IMAGEN_FAST_INLINE Vec(float value) : raw(_mm256_set1_ps(value)) {}
  IMAGEN_FAST_INLINE explicit Vec(__m256 value) : raw(value) {}

  static IMAGEN_FAST_INLINE Vec load(const float* from, AllLanes) { return Vec(_mm256_loadu_ps(from)); }
  static IMAGEN_FAST_INLINE Vec load(const float* from, FirstLanes lanes) {
    return Vec(_mm256_maskload_ps(from, lane_mask(lanes)));
  }
  template <typename Lanes>
  static IMAGEN_FAST_INLINE Vec load(const BFloat16* from, Lanes lanes) {
    return Vec(bf16_to_float(load_16bit(from, lanes)));
  }
  template <typename Lanes>
  static IMAGEN_FAST_INLINE Vec load(const Half* from, Lanes lanes) {
    return Vec(_mm256_cvtph_ps(load_16bit(from, lanes)));
  }

  IMAGEN_FAST_INLINE void store(float* to, AllLanes) const { _mm256_storeu_ps(to, raw); }
  IMAGEN_FAST_INLINE void store(float* to, FirstLanes lanes) const { _mm256_maskstore_ps(to, lane_mask(lanes), raw); }
  template <typename Lanes>
  IMAGEN_FAST_INLINE void store(BFloat16* to, Lanes lanes) const {
    store_16bit(to, float_to_bf16(raw), lanes);
  }
  template <typename Lanes>
  IMAGEN_FAST_INLINE void store(Half* to, Lanes lanes) const {
    store_16bit(to, _mm256_cvtps_ph(raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), lanes);
  }

  friend IMAGEN_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Vec operator/(Vec a, Vec b) { return Vec(_mm256_div_ps(a.raw, b.raw)); }
  friend IMAGEN_FAST_INLINE Mask operator>=(Vec a, Vec b) { return _mm256_cmp_ps(a.raw, b.raw, _CMP_GE_OQ); }
};

IMAGEN_FAST_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>(_mm256_fmadd_ps(a.raw, b.raw, c.raw));
}

IMAGEN_FAST_INLINE Vec<float> select(__m256 mask, Vec<float> yes, Vec<float> no) {
  return Vec<float>(_mm256_blendv_ps(no.raw, yes.raw, mask));
}

IMAGEN_FAST_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm256_max_ps(a.raw, b.raw));
}

IMAGEN_FAST_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm256_min_ps(a.raw, b.raw));
}

IMAGEN_FAST_INLINE Vec<float> abs(Vec<float> a) {
  return Vec<float>(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.raw));
}

IMAGEN_FAST_INLINE Vec<float> round(Vec<float> a) {
  return Vec<float>(_mm256_round_ps(a.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

IMAGEN_FAST_INLINE Vec<float> scale_exponent(Vec<float> a, Vec<float> n) {
  // Twice 2^(n/2): one factor alone could not be represented.
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i exponent = _mm256_cvtps_epi32(n.raw);
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(exponent, half), bias), 23);
  return Vec<float>(_mm256_mul_ps(_mm256_mul_ps(a.raw, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second)));
}

IMAGEN_FAST_INLINE Vec<float> keep(Vec<float> a, FirstLanes lanes) {
  return Vec<float>(_mm256_and_ps(a.raw, _mm256_castsi256_ps(lane_mask(lanes))));
}

IMAGEN_FAST_INLINE float sum(Vec<float> a) {
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(a.raw), _mm256_extractf128_ps(a.raw, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
