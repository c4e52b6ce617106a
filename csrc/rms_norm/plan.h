// How the rows of rms_norm are taken: by their width, so that a row's result does not depend on the others; backward
// also by their number and the device.
//
//   resident    A row stays in the registers of one warp, of which a block has several, or of one block: it is read
//   once.
//               Backward, a block goes from row to row, and sums up what they give to the weight's gradient.
//   walk        Wider rows are walked twice by one block. The weight's gradient has a kernel of its own.
#pragma once

#include <algorithm>

#include "../common/cuda.cuh"

namespace imagen_fast::rms_norm::device {

constexpr int kMaxThreads = 512;
constexpr int kWarps = 4;               // of a block whose warps have a row each
constexpr int kColumnThreads = 128;     // of a block that sums up columns of walked rows
constexpr int kThreadsInFlight = 1024;  // of a multiprocessor, backward

// Vectors of a row that a thread holds at most: 64 bytes, or 16 elements that are loaded one by one. Backward half as
// many, since it holds dy too, and sums in float.
template <int V>
constexpr int kHeldForward = V > 1 ? 4 : 16;
template <int V>
constexpr int kHeldBackward = kHeldForward<V> / 2;

struct Sizes {
  int64_t rows;
  int64_t width;
  int element_bytes;
  bool aligned;  // all rows and the weight, to 16 bytes
  bool backward;
};

struct Plan {
  bool resident;
  int vector;             // elements in one access
  int threads;            // of a row
  int abreast;            // rows of a block at a time
  int64_t blocks;         // forward, and backward where rows are walked
  int64_t row_blocks;     // backward: parts of dweight
  int64_t rows_of_block;  // backward
};

inline Plan make_plan(const Sizes& s, const DeviceProperties& device) {
  Plan plan{};
  const int widest = 16 / s.element_bytes;
  plan.vector = s.aligned && s.width % widest == 0 ? widest : 1;
  const int64_t vectors = s.width / plan.vector;
  const int few = plan.vector > 1 ? kHeldBackward<2> : kHeldBackward<1>;
  const int most = s.backward ? few : plan.vector > 1 ? kHeldForward<2> : kHeldForward<1>;
  plan.resident = vectors <= static_cast<int64_t>(kMaxThreads) * most;
  plan.abreast = vectors <= kWarpSize * few ? kWarps : 1;
  const int64_t warps = ceil_div<int64_t>(vectors, few * kWarpSize);
  plan.threads = static_cast<int>(std::min<int64_t>(warps * kWarpSize, kMaxThreads));
  plan.blocks = ceil_div<int64_t>(s.rows, plan.abreast);
  if (!s.backward) return plan;

  // As many blocks as the device has room for, each with some of the rows
  const int64_t columns = plan.resident ? 1 : ceil_div<int64_t>(vectors, kColumnThreads);
  const int threads = plan.resident ? plan.threads * plan.abreast : kColumnThreads;
  const int64_t room = ceil_div<int64_t>(
      static_cast<int64_t>(device.multiprocessors) * std::max(kThreadsInFlight / threads, 1), columns);
  plan.rows_of_block = ceil_div(plan.blocks, std::min(plan.blocks, room)) * plan.abreast;
  plan.row_blocks = ceil_div(s.rows, plan.rows_of_block);
  return plan;
}

}  // namespace imagen_fast::rms_norm::device
