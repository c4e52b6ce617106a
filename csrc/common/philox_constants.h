// The numbers of Philox4x32-10 and of the transform to normals, for the CPU (philox.h) and for CUDA (cuda_philox.cuh).
#pragma once

#include <cstdint>

namespace imagen_fast {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

// In two parts each: the first with few digits or rounded, the second what that leaves out
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kTwoPiHigh = 6.2831854820251465f, kTwoPiLow = -1.7484556025237907e-07f;

constexpr uint32_t kSqrtHalfBits = 0x3f3504f3u;  // of sqrt(1/2) in float32

}  // namespace imagen_fast

// Coefficients of log(1 + f) = f - f^2 / 2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1], minimax to 1e-9; of
// sin(2 pi r) = 2 pi r + r^3 P(r^2) and cos(2 pi r) = 1 + r^2 P(r^2) on [-1/8, 1/8], to 1e-10. (Macros: device code
// reads arrays only of its own functions.)
#define IMAGEN_FAST_NORMAL_LOG                                                                                 \
  0.3333331346511841f, -0.25000008940696716f, 0.2000211924314499f, -0.1666799634695053f, 0.14219552278518677f, \
      -0.1240558922290802f, 0.11888162046670914f, -0.11675652861595154f, 0.06746642291545868f
#define IMAGEN_FAST_NORMAL_SIN -41.34170150756836f, 81.60520935058594f, -76.69837951660156f, 41.48757553100586f
#define IMAGEN_FAST_NORMAL_COS -19.739208221435547f, 64.93932342529297f, -85.44374084472656f, 59.24596405029297f
