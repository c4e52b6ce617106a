// How add_noise is cut into chunks.
#pragma once

#include <algorithm>

#include "kernel.cuh"

namespace imagen_fast::add_noise::device {

constexpr int64_t kBytesOfThread = 64;  // of one tensor

struct Plan {
  int vector;  // elements in one access
  int64_t chunk, chunks;
};

inline Plan make_plan(const SampleOrder& order, const View& x0, const View& noise, const void* y, int64_t batch,
                      int element_bytes) {
  const bool aligned = reads_vectors(order, x0, batch, element_bytes) &&
                       reads_vectors(order, noise, batch, element_bytes) && is_aligned(y, 16) &&
                       (batch == 1 || order.size() * element_bytes % 16 == 0);
  Plan plan;
  plan.vector = aligned ? 16 / element_bytes : 1;
  plan.chunk = kThreads * kBytesOfThread / element_bytes;
  plan.chunks = ceil_div(order.size(), plan.chunk);
  return plan;
}

}  // namespace imagen_fast::add_noise::device
