// Normal noise that is a function of (seed, row, stage, element) alone.
//
// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011) with the seed as
// key and the counter (e mod 2^32, e / 2^32, row, stage) gives four words, of which two Box-Muller pairs make the
// normals of the elements 4 e, ..., 4 e + 3:
//
//   u = (w0 + 1/2) / 2^32, f = int32(w1) / 2^32, each rounded to float32
//   sqrt(-2 log u) cos(2 pi f), sqrt(-2 log u) sin(2 pi f)        and likewise from w2 and w3
//
// The words are those of every other backend, bit for bit; the normals are within 2 ulp of the formula.
#pragma once

#include "philox_constants.h"
#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace imagen_fast::IMAGEN_FAST_ISA {

struct NoiseStream {
  uint64_t seed;
  uint32_t row;
  uint32_t stage;
};

namespace philox {

typedef uint64_t Wide64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t SignedWords __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

constexpr int kCounters = kVectorBytes / 8;  // at a time, each in 64 bits
constexpr int kElements = 4 * kCounters;     // that they make

// The low 32 bits of each lane, times m
IMAGEN_FAST_INLINE Wide64 multiply(Wide64 a, uint32_t m) {
#if defined(__AVX512F__)
  return (Wide64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (Wide64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  return (Wide64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(m);
#endif
}

// The four words of kCounters counters from e on: word j of counter i in the low half of lane i of word[j]; whatever
// is left of the computation in the high half.
struct State {
  Wide64 word[4];
};

IMAGEN_FAST_INLINE State words(NoiseStream stream, uint64_t e) {
  Wide64 lane;
  for (int i = 0; i < kCounters; ++i) lane[i] = static_cast<uint64_t>(i);
  const Wide64 counter = lane + e;
  Wide64 c0 = counter, c1 = counter >> 32, c2 = Wide64{} + stream.row, c3 = Wide64{} + stream.stage;
  uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Wide64 p0 = multiply(c0, kPhiloxMultiplier0), p1 = multiply(c2, kPhiloxMultiplier1);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  return {{c0, c1, c2, c3}};
}

// a0 b0 a1 b1 ..., of the low halves
IMAGEN_FAST_INLINE Words merge(Wide64 a, Wide64 b) { return (Words)((a & 0xffffffffu) | b << 32); }

IMAGEN_FAST_INLINE Floats unsigned_to_float(Words w) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepu32_ps((__m512i)w);
#else
  // In halves, which are exact, so that the sum alone is rounded
  const Floats high = __builtin_convertvector((SignedWords)(w >> 16), Floats);
  const Floats low = __builtin_convertvector((SignedWords)(w & 0xffffu), Floats);
  return high * 65536.0f + low;
#endif
}

constexpr float kLog[] = {IMAGEN_FAST_NORMAL_LOG};
constexpr float kSin[] = {IMAGEN_FAST_NORMAL_SIN};
constexpr float kCos[] = {IMAGEN_FAST_NORMAL_COS};
constexpr double kTwoPi = 6.283185307179586;

template <int kCount, typename V>
IMAGEN_FAST_INLINE V polynomial(const float (&coefficient)[kCount], V x) {
  V p = V(coefficient[kCount - 1]);
#pragma GCC unroll 8
  for (int i = kCount - 2; i >= 0; --i) p = fma(p, x, V(coefficient[i]));
  return p;
}

struct Pair {
  Floats cosine, sine;
};

#ifdef __FP_FAST_FMAF
// With its results in two parts where that costs an instruction or two, to stay within 2 ulp
IMAGEN_FAST_INLINE Pair box_muller(Words for_radius, Words for_angle) {
  using V = Vec<float>;
  const auto vec = [](Floats value) { return V(bit_cast<decltype(V::raw)>(value)); };
  const auto floats = [](V value) { return bit_cast<Floats>(value.raw); };

  const Floats u = unsigned_to_float(for_radius) * 0x1p-32f + 0x1p-33f;
  const SignedWords exponent = (SignedWords)((Words)u - kSqrtHalfBits) >> 23;
  const V n = vec(__builtin_convertvector(exponent, Floats));
  const V f = vec((Floats)((Words)u - ((Words)exponent << 23)) - 1.0f);
  const V f2 = f * f;
  V tail = fma(n, V(kLn2Low), polynomial(kLog, f) * (f2 * f));
  tail = fma(f2, V(-0.5f), tail);
  const V log_u = fma(n, V(kLn2High), f + tail);
  const Floats square = floats(log_u * V(-2.0f));
#if defined(__AVX512F__)
  const V radius(_mm512_sqrt_ps((__m512)square));
#else
  const V radius(_mm256_sqrt_ps((__m256)square));
#endif

  const V turns = vec(__builtin_convertvector((SignedWords)for_angle, Floats) * 0x1p-32f);
  const V shifted = fma(turns, V(4.0f), V(0x1.8p23f));
  const V r = fma(shifted - V(0x1.8p23f), V(-0.25f), turns);
  const V r2 = r * r;
  const V p = polynomial(kCos, r2);
  const V cos_high = fma(r2, p, V(1.0f));
  const V cos_low = fma(r2, p, V(1.0f) - cos_high);
  const V rest = r * fma(r2, polynomial(kSin, r2), V(kTwoPiLow));
  const V two_pi(kTwoPiHigh);
  const V sin_high = fma(r, two_pi, rest);
  const V sin_low = fms(r, two_pi, sin_high) + rest;
  const Words cosine = (Words)floats(fma(radius, cos_high, radius * cos_low));
  const Words sine = (Words)floats(fma(radius, sin_high, radius * sin_low));

  const Words quadrant = (Words)floats(shifted);
  const Words swap = -(quadrant & 1u);
  const Words cosine_sign = ((quadrant + 1u) & 2u) << 30, sine_sign = (quadrant & 2u) << 30;
  return {(Floats)(((cosine & ~swap) | (sine & swap)) ^ cosine_sign),
          (Floats)(((sine & ~swap) | (cosine & swap)) ^ sine_sign)};
}
#else
// Without fused operations float32 is not enough for 2 ulp.
IMAGEN_FAST_INLINE Pair box_muller(Words for_radius, Words for_angle) {
  const auto horner = [](const auto& coefficient, double x) {
    double p = 0;
    for (int i = static_cast<int>(sizeof(coefficient) / sizeof(float)) - 1; i >= 0; --i) p = p * x + coefficient[i];
    return p;
  };
  const Floats u = unsigned_to_float(for_radius) * 0x1p-32f + 0x1p-33f;
  const SignedWords exponent = (SignedWords)((Words)u - kSqrtHalfBits) >> 23;
  const Floats mantissa = (Floats)((Words)u - ((Words)exponent << 23));
  const Floats turns = __builtin_convertvector((SignedWords)for_angle, Floats) * 0x1p-32f;
  Pair pair;
  for (int i = 0; i < kVectorBytes / 4; ++i) {
    const double f = static_cast<double>(mantissa[i]) - 1;
    const double log_u = exponent[i] * 0.6931471805599453 + (f - f * f * (0.5 - f * horner(kLog, f)));
    const double radius = std::sqrt(-2 * log_u);
    const int quadrant = static_cast<int>(bit_cast<uint32_t>(turns[i] * 4.0f + 0x1.8p23f) & 3);
    const double r = turns[i] - 0.25 * (turns[i] * 4.0f + 0x1.8p23f - 0x1.8p23f);
    const double cosine = radius * (1 + r * r * horner(kCos, r * r));
    const double sine = radius * (r * (kTwoPi + r * r * horner(kSin, r * r)));
    const double turned_cosine = quadrant & 1 ? sine : cosine, turned_sine = quadrant & 1 ? cosine : sine;
    pair.cosine[i] = static_cast<float>((quadrant + 1) & 2 ? -turned_cosine : turned_cosine);
    pair.sine[i] = static_cast<float>(quadrant & 2 ? -turned_sine : turned_sine);
  }
  return pair;
}
#endif

}  // namespace philox

constexpr int64_t kNoiseElements = philox::kElements;  // a multiple of which fill_normals writes

// The normals of the elements [first, first + n), and what fills the last vector; first is a multiple of 4.
inline void fill_normals(float* to, NoiseStream stream, uint64_t first, int64_t n) {
  using namespace philox;
  for (int64_t i = 0; i < n; i += kElements) {
    const State state = words(stream, first / 4 + static_cast<uint64_t>(i / 4));
    // Lanes 2 i and 2 i + 1 hold what the two pairs of counter i are made of.
    const Pair pair = box_muller(merge(state.word[0], state.word[2]), merge(state.word[1], state.word[3]));
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(to + i, _mm512_permutex2var_ps((__m512)pair.cosine, low, (__m512)pair.sine));
    _mm512_storeu_ps(to + i + 16, _mm512_permutex2var_ps((__m512)pair.cosine, high, (__m512)pair.sine));
#elif defined(__AVX2__)
    const __m256 even = _mm256_unpacklo_ps((__m256)pair.cosine, (__m256)pair.sine);
    const __m256 odd = _mm256_unpackhi_ps((__m256)pair.cosine, (__m256)pair.sine);
    _mm256_storeu_ps(to + i, _mm256_permute2f128_ps(even, odd, 0x20));
    _mm256_storeu_ps(to + i + 8, _mm256_permute2f128_ps(even, odd, 0x31));
#else
    for (int j = 0; j < kElements / 2; ++j) {
      to[i + 2 * j] = pair.cosine[j];
      to[i + 2 * j + 1] = pair.sine[j];
    }
#endif
  }
}

// The words of `count` counters from e on, four each.
inline void fill_words(uint32_t* to, NoiseStream stream, uint64_t e, int64_t count) {
  for (int64_t i = 0; i < count; i += philox::kCounters) {
    const philox::State state = philox::words(stream, e + static_cast<uint64_t>(i));
    for (int64_t j = 0; j < philox::kCounters && i + j < count; ++j) {
      for (int k = 0; k < 4; ++k) to[4 * (i + j) + k] = static_cast<uint32_t>(state.word[k][j]);
    }
  }
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
