// The element types of tensors as the CPU kernels see them. No torch header may be included here: this file is compiled
// once per instruction set, and an inline function shared between those objects could be merged into the wrong one.
#pragma once

#include <cstdint>
#include <cstring>

namespace imagen_fast {

enum class DType : uint8_t { kHalf, kBFloat16, kFloat, kDouble };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

}  // namespace imagen_fast

#ifdef IMAGEN_FAST_ISA
namespace imagen_fast::IMAGEN_FAST_ISA {

// What sums and statistics of a tensor of T are computed in.
template <typename T>
struct AccumulateTypeOf {
  using type = float;
};
template <>
struct AccumulateTypeOf<double> {
  using type = double;
};
template <typename T>
using AccumulateType = typename AccumulateTypeOf<T>::type;

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  // Shifted into place the exponent is too small by 127 - 15; a multiplication mends it and normalises subnormals.
  const float shifted = bit_cast<float>(magnitude << 13);
  return bit_cast<float>(sign | bit_cast<uint32_t>(shifted * 0x1p112f));
}

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(double value, double* to) { *to = value; }

// Rounds to nearest, ties to even.
inline void narrow(float value, BFloat16* to) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

inline void narrow(float value, Half* to) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    magnitude = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    magnitude = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the end of the float's.
    magnitude = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    magnitude = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | magnitude);
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
#endif
