// Vec<S>: as many lanes of S (float or double) as one register of this object's instruction set holds. Loads widen
// fp16 and bf16, stores round back to nearest even. Vec<float> is written per instruction set, Vec<double> is generic.
#pragma once

#include <cstdint>

#include "number_formats.h"

#define IMAGEN_FAST_INLINE inline __attribute__((always_inline))

namespace imagen_fast::IMAGEN_FAST_ISA {

// Which lanes a load, a store or a sum concerns: all of them, or those of a row's last, incomplete vector.
struct AllLanes {};
struct FirstLanes {
  int count;
};

template <typename S>
struct Vec;

}  // namespace imagen_fast::IMAGEN_FAST_ISA

#include "vec_generic.h"  // must come first: the others specialise it

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#endif

namespace imagen_fast::IMAGEN_FAST_ISA {

// Calls body(offset, lanes) for every vector of a row of n elements.
template <int kWidth, typename Body>
IMAGEN_FAST_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, AllLanes{});
  if (i < n) body(i, FirstLanes{static_cast<int>(n - i)});
}

// Calls body(offset, slot, lanes), slot in 0 ... 3, for every vector of a row of n elements. One accumulator per slot
// keeps four additions in flight.
template <int kWidth, typename Body>
IMAGEN_FAST_INLINE void for_each_vector_in_slots(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    body(i, 0, AllLanes{});
    body(i + kWidth, 1, AllLanes{});
    body(i + 2 * kWidth, 2, AllLanes{});
    body(i + 3 * kWidth, 3, AllLanes{});
  }
  for (; i + kWidth <= n; i += kWidth) body(i, 0, AllLanes{});
  if (i < n) body(i, 1, FirstLanes{static_cast<int>(n - i)});
}

// The sum of four accumulators' lanes.
template <typename S>
IMAGEN_FAST_INLINE S sum_slots(const Vec<S> (&slots)[4]) {
  return sum((slots[0] + slots[1]) + (slots[2] + slots[3]));
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
