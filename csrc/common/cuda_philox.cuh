// The noise of philox.h on a GPU: the same words, bit for bit, and normals within 2 ulp of the same formula.
#pragma once

#include "cuda.cuh"
#include "philox_constants.h"

namespace imagen_fast {

struct NoiseStream {
  uint64_t seed;
  uint32_t row;
  uint32_t stage;
};

// The four words of counter e
__device__ __forceinline__ uint4 philox_words(const NoiseStream& stream, uint64_t e) {
  uint4 c{static_cast<uint32_t>(e), static_cast<uint32_t>(e >> 32), stream.row, stream.stage};
  uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    c = {__umulhi(c.z, kPhiloxMultiplier1) ^ c.y ^ k0, c.z * kPhiloxMultiplier1,
         __umulhi(c.x, kPhiloxMultiplier0) ^ c.w ^ k1, c.x * kPhiloxMultiplier0};
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  return c;
}

template <int kCount>
__device__ __forceinline__ float polynomial(const float (&coefficient)[kCount], float x) {
  float p = coefficient[kCount - 1];
#pragma unroll
  for (int i = kCount - 2; i >= 0; --i) p = fmaf(p, x, coefficient[i]);
  return p;
}

// Two normals. The results are in two parts where that costs an instruction or two, to stay within 2 ulp.
__device__ __forceinline__ float2 box_muller(uint32_t for_radius, uint32_t for_angle) {
  constexpr float kLog[] = {IMAGEN_FAST_NORMAL_LOG};
  constexpr float kSin[] = {IMAGEN_FAST_NORMAL_SIN};
  constexpr float kCos[] = {IMAGEN_FAST_NORMAL_COS};

  const float u = fmaf(static_cast<float>(for_radius), 0x1p-32f, 0x1p-33f);
  const int exponent = static_cast<int>(__float_as_uint(u) - kSqrtHalfBits) >> 23;
  const float n = static_cast<float>(exponent);
  const float f = __uint_as_float(__float_as_uint(u) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float f2 = __fmul_rn(f, f);
  float tail = fmaf(n, kLn2Low, __fmul_rn(polynomial(kLog, f), __fmul_rn(f2, f)));
  tail = fmaf(f2, -0.5f, tail);
  const float log_u = fmaf(n, kLn2High, __fadd_rn(f, tail));
  const float radius = __fsqrt_rn(-2.0f * log_u);

  const float turns = static_cast<float>(static_cast<int32_t>(for_angle)) * 0x1p-32f;
  const float shifted = fmaf(turns, 4.0f, 0x1.8p23f);  // its low bits: the nearest quarter of a turn
  const float r = fmaf(__fsub_rn(shifted, 0x1.8p23f), -0.25f, turns);
  const float r2 = __fmul_rn(r, r);
  const float p = polynomial(kCos, r2);
  const float cos_high = fmaf(r2, p, 1.0f);
  const float cos_low = fmaf(r2, p, __fsub_rn(1.0f, cos_high));
  const float rest = __fmul_rn(r, fmaf(r2, polynomial(kSin, r2), kTwoPiLow));
  const float sin_high = fmaf(r, kTwoPiHigh, rest);
  const float sin_low = __fadd_rn(fmaf(r, kTwoPiHigh, -sin_high), rest);
  const float cosine = fmaf(radius, cos_high, __fmul_rn(radius, cos_low));
  const float sine = fmaf(radius, sin_high, __fmul_rn(radius, sin_low));

  const uint32_t quadrant = __float_as_uint(shifted);
  const bool swap = quadrant & 1u;
  const float first = swap ? sine : cosine, second = swap ? cosine : sine;
  return {(quadrant + 1u) & 2u ? -first : first, quadrant & 2u ? -second : second};
}

// The normals of the elements 4 e, ..., 4 e + 3
__device__ __forceinline__ float4 philox_normals(const NoiseStream& stream, uint64_t e) {
  const uint4 w = philox_words(stream, e);
  const float2 a = box_muller(w.x, w.y), b = box_muller(w.z, w.w);
  return {a.x, a.y, b.x, b.y};
}

}  // namespace imagen_fast
