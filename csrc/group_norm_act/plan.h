// How group_norm_act is cut into tiles for a device (see ../common/cuda_norm_tile.cuh), by the shape of one sample, so
// that a sample's result does not depend on the batch that it is in.
//
//   - A slice that fits the shared memory of one block stays there: read once.
//   - From capability 9.0 on a slice may be spread over a cluster of up to 8 blocks: where it is too large for one, and
//     where the slices of one sample alone would leave multiprocessors idle.
//   - What is larger is split over the grid and read twice; without clusters also what would leave most of the device
//     idle.
#pragma once

#include <algorithm>

#include "../common/cuda_norm_plan.h"
#include "../common/cuda_norm_tile.cuh"

namespace imagen_fast::group_norm_act::device {

constexpr int64_t kSmallTile = 4 << 10;        // bytes of a tensor; no smaller tiles are made to fill the device
constexpr int64_t kSplitTile = 32 << 10;       // bytes of a tensor that a block takes of what is split
constexpr int64_t kMostChunks = 1024;          // of a slice: each block of the second pass reads what all have found
constexpr int64_t kWorthSplitting = 16 << 10;  // bytes of a slice

struct Sizes {
  int element_bytes;
  bool channels_last;
  bool aligned;  // all tensors to 16 bytes
  int channels;
  int64_t positions;
  int groups;
  int tensors;  // that are read: 1 forward, 2 backward
};

struct Plan {
  bool resident;
  int vector;  // elements in one access
  int groups_together;
  int slices;
  int chunks;
  int64_t chunk;  // positions
  int threads;
  int team;
  int tile_bytes;
  int affine_bytes;
  int sums_bytes;
  int scratch_bytes;
};

// How many groups of NHWC a slice takes: enough for a sector, and for whole vectors. 0 if there is no such number.
inline int groups_together(const Sizes& s, int vector) {
  const int per_group = s.channels / s.groups;
  const int most = std::min(s.groups, kMaxGroups);
  for (int n = 1; n <= most; ++n) {
    const int64_t channels = static_cast<int64_t>(n) * per_group;
    if (n > 1 && channels / vector > kMaxThreads / 2) return 0;
    if (channels % vector == 0 && (channels * s.element_bytes >= kSector || n == most)) return n;
  }
  return 0;
}

// The threads of a tile, and how they are abreast
inline void arrange_threads(const Sizes& s, Plan* plan) {
  const int slice_channels = plan->groups_together * (s.channels / s.groups);
  const int64_t vectors = plan->chunk * slice_channels / plan->vector;
  int threads = std::clamp(power_of_two_at_least(ceil_div<int64_t>(std::min<int64_t>(vectors, 1 << 20), 4)), kWarpSize,
                           kMaxThreads);
  if (s.channels_last) {
    const int lines = slice_channels / plan->vector;
    threads = std::max(threads, std::min(kMaxThreads, ceil_div(lines, kWarpSize) * kWarpSize));
    plan->team = std::min(lines, threads);
    if (2 * plan->team > threads) threads = ceil_div(plan->team, kWarpSize) * kWarpSize;  // the rest would idle
    plan->scratch_bytes = threads / plan->team * slice_channels * static_cast<int>(sizeof(float2));
    if (plan->team < lines) plan->scratch_bytes = 0;
  } else {
    const int warps = threads / kWarpSize;
    const int columns = static_cast<int>(std::min<int64_t>(plan->chunk / plan->vector, 1 << 20));
    // Several vectors of a line for each thread, but 128 bytes abreast; more than a warp only where lines are few.
    const int wanted =
        std::min(std::max(power_of_two_at_least(ceil_div(columns, 4)), 8), power_of_two_at_least(columns));
    const int most = slice_channels >= warps ? kWarpSize : threads / (power_of_two_at_least(slice_channels + 1) / 2);
    plan->team = std::min({wanted, most, threads});
    plan->scratch_bytes =
        plan->team > kWarpSize ? slice_channels * (plan->team / kWarpSize) * static_cast<int>(sizeof(float2)) : 0;
  }
  plan->threads = threads;
}

inline Plan make_plan(const Sizes& s, const DeviceProperties& device) {
  Plan plan{};
  const int widest = 16 / s.element_bytes;
  plan.vector = 1;
  plan.groups_together = 1;
  if (s.channels_last) {
    plan.groups_together = groups_together(s, 1);
    if (s.aligned && s.channels % widest == 0) {
      if (const int together = groups_together(s, widest)) {
        plan.vector = widest;
        plan.groups_together = together;
      }
    }
    plan.groups_together = std::max(plan.groups_together, 1);
  } else if (s.aligned && s.positions % widest == 0) {
    plan.vector = widest;
  }
  plan.slices = ceil_div(s.groups, plan.groups_together);
  const int64_t slice_channels = static_cast<int64_t>(plan.groups_together) * (s.channels / s.groups);
  const int unit = s.channels_last ? 1 : plan.vector;  // positions that stay together
  const int64_t units = s.positions / unit;
  const int64_t unit_bytes = unit * slice_channels * s.element_bytes;

  // Resident?
  const bool few_channels = slice_channels <= kAffinesInShared;
  plan.affine_bytes = few_channels ? rounded_bytes(slice_channels * 8) : 0;
  plan.sums_bytes = s.tensors == 2 && few_channels ? rounded_bytes(slice_channels * 8) : 0;
  const int most_scratch = kMaxThreads * (s.channels_last ? plan.vector : 1) * static_cast<int>(sizeof(float2));
  const int64_t room =
      device.shared_bytes_per_block - kStaticShared - plan.affine_bytes - 2 * plan.sums_bytes - most_scratch;
  const auto bytes_in = [&](int64_t chunks) { return ceil_div(units, chunks) * unit_bytes; };
  const int most = device.clusters() ? 8 : 1;
  int chunks = 1;
  while (
      chunks < most && chunks < units &&
      (3 * s.tensors * bytes_in(chunks) > room ||
       (static_cast<int64_t>(plan.slices) * chunks < device.multiprocessors && bytes_in(chunks) >= 2 * kSmallTile))) {
    chunks *= 2;
  }
  const bool idle = !device.clusters() && 2 * plan.slices < device.multiprocessors && bytes_in(1) > kWorthSplitting;
  plan.resident = few_channels && s.tensors * (bytes_in(chunks) + 128) <= room && !idle;

  if (!plan.resident) {
    const int64_t to_fill = ceil_div<int64_t>(2 * device.multiprocessors, plan.slices);
    const int64_t by_size = ceil_div(units * unit_bytes, kSplitTile);
    const int64_t largest = std::max<int64_t>(1, units * unit_bytes / kSmallTile);
    chunks = static_cast<int>(std::min({std::max(by_size, std::min(to_fill, largest)), units, kMostChunks}));
  }
  plan.chunk = ceil_div<int64_t>(units, chunks) * unit;
  // A cluster keeps its size; its last blocks may have nothing to do.
  plan.chunks = plan.resident ? chunks : static_cast<int>(ceil_div(s.positions, plan.chunk));
  plan.tile_bytes = plan.resident ? rounded_bytes(plan.chunk * slice_channels * s.element_bytes) : 0;
  arrange_threads(s, &plan);
  return plan;
}

}  // namespace imagen_fast::group_norm_act::device
