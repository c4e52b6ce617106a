// How channel_rms_norm_act is cut into tiles for a device (see kernel_forward.cuh), by the shape of one sample, so that
// a sample's result does not depend on the batch that it is in.
//
// A tile has some positions with all their channels: about kTile bytes, fewer where one sample would leave
// multiprocessors idle otherwise, but in NCHW at least a sector of memory of each channel, which is what it costs.
#pragma once

#include <algorithm>

#include "../common/cuda_norm_plan.h"
#include "kernel_backward.cuh"

namespace imagen_fast::channel_rms_norm_act::device {

constexpr int64_t kTile = 16 << 10;          // bytes of a tensor
constexpr int64_t kSmallTile = 2 << 10;      // bytes of a tensor; no smaller tiles are made to fill the device
constexpr int kThreads = 256;                // of a tile, at most, where lines do not need more
constexpr int kBlocksPerMultiprocessor = 8;  // of the backward pass: more blocks leave more sums to add up

struct Sizes {
  int element_bytes;
  bool channels_last;
  bool aligned;  // all tensors to 16 bytes
  int channels;
  int64_t positions;
  int tensors;  // that are read: 1 forward, 2 backward
};

struct Plan {
  bool resident;
  int vector;     // elements in one access
  int64_t chunk;  // positions of a tile
  int chunks;     // tiles of a sample
  int threads;
  int team;
  int lanes;
  int tile_bytes;
  int affine_bytes;
  int sums_bytes;
  int scratch_bytes;
  int position_bytes;  // for what is kept of each position
  int blocks;          // of a sample
  int tiles;           // of a block

  size_t shared_bytes(int tensors) const {
    return static_cast<size_t>(tensors) * tile_bytes + affine_bytes + sums_bytes + scratch_bytes + position_bytes;
  }
};

// How many positions a tile has
inline int64_t positions_of_tile(const Sizes& s, int vector, const DeviceProperties& device) {
  const int64_t position_bytes = static_cast<int64_t>(s.channels) * s.element_bytes;
  int64_t least = std::max<int64_t>(1, ceil_div(kSmallTile, position_bytes));
  int64_t most = kThreads;
  if (!s.channels_last) {
    least = std::max<int64_t>({least, vector, kSector / s.element_bytes});
    most = kWarpSize * vector;  // a line's vectors lie in one warp
  }
  most = power_of_two_at_least(std::min<int64_t>(s.positions, most));  // of which a vector divides those of NCHW
  least = std::min<int64_t>(power_of_two_at_least(least), most);
  int64_t positions = least;
  while (2 * positions <= most && 2 * positions * position_bytes <= kTile &&
         ceil_div(s.positions, 2 * positions) >= 2 * device.multiprocessors) {
    positions *= 2;
  }
  return positions;
}

// The threads of a tile, and how they are abreast
inline void arrange_threads(const Sizes& s, Plan* plan) {
  const int64_t vectors = plan->chunk * s.channels / plan->vector;
  int threads =
      std::clamp(power_of_two_at_least(ceil_div<int64_t>(std::min<int64_t>(vectors, 1 << 20), 4)), kWarpSize, kThreads);
  plan->lanes = 1;
  if (s.channels_last) {
    const int lines = s.channels / plan->vector;
    threads = std::max(threads, std::min(kMaxThreads, ceil_div(lines, kWarpSize) * kWarpSize));
    plan->team = std::min(lines, threads);
    threads = ceil_div(threads / plan->team * plan->team, kWarpSize) * kWarpSize;  // the rest would idle
    plan->lanes = std::min(kWarpSize, power_of_two_at_least(lines));
  } else {
    plan->team = power_of_two_at_least(plan->chunk / plan->vector);
    threads = std::max(threads, plan->team);
  }
  plan->threads = threads;
}

inline Plan make_plan(const Sizes& s, const DeviceProperties& device) {
  Plan plan{};
  const int widest = 16 / s.element_bytes;
  plan.vector = s.aligned && (s.channels_last ? s.channels : s.positions) % widest == 0 ? widest : 1;
  plan.chunk = positions_of_tile(s, plan.vector, device);
  plan.chunks = static_cast<int>(ceil_div(s.positions, plan.chunk));
  arrange_threads(s, &plan);

  const bool backward = s.tensors == 2;
  const bool few_channels = s.channels <= kAffinesInShared;
  plan.affine_bytes = few_channels ? rounded_bytes(static_cast<int64_t>(s.channels) * sizeof(ChannelAffine)) : 0;
  plan.sums_bytes = backward && few_channels ? rounded_bytes(static_cast<int64_t>(s.channels) * sizeof(float2)) : 0;
  plan.position_bytes = rounded_bytes(plan.chunk * (backward ? sizeof(PositionTerms) : sizeof(float)));
  if (!s.channels_last) {
    plan.scratch_bytes = rounded_bytes(plan.threads / kWarpSize * plan.chunk * sizeof(float));
  } else if (backward && plan.threads / plan.team > 1) {
    plan.scratch_bytes = rounded_bytes(plan.threads / plan.team * static_cast<int64_t>(s.channels) * sizeof(float2));
  }
  const int64_t bytes = ceil_div<int64_t>(plan.chunk * s.channels * s.element_bytes, 128) * 128;
  const int64_t room = device.shared_bytes_per_block - kStaticShared - static_cast<int64_t>(plan.shared_bytes(0));
  plan.resident = s.tensors * bytes <= room;
  plan.tile_bytes = plan.resident ? static_cast<int>(bytes) : 0;

  const int64_t most_blocks = static_cast<int64_t>(kBlocksPerMultiprocessor) * device.multiprocessors;
  plan.tiles = backward ? static_cast<int>(ceil_div<int64_t>(plan.chunks, most_blocks)) : 1;
  plan.blocks = ceil_div(plan.chunks, plan.tiles);
  return plan;
}

}  // namespace imagen_fast::channel_rms_norm_act::device
