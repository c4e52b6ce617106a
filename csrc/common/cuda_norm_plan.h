// What the plans of the norms share.
#pragma once

#include "cuda.cuh"

namespace imagen_fast {

constexpr int kSector = 32;             // bytes that memory moves at least
constexpr int kStaticShared = 4 << 10;  // bytes: room for the kernels' own variables

inline int power_of_two_at_least(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Of a part of dynamic shared memory, so that the next part is aligned
inline int rounded_bytes(int64_t bytes) { return static_cast<int>(ceil_div<int64_t>(bytes, 128) * 128); }

}  // namespace imagen_fast
