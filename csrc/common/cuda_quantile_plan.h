// Who selects a sample's quantile, and where its values are meanwhile (see cuda_quantile.cuh), by the size of a sample:
//
//   - one block, in its shared memory;
//   - a cluster of up to 8 blocks, from capability 9.0 on;
//   - the whole grid of a cooperative launch, some blocks for each sample, which takes samples in turn if it does not
//     hold all at a time;
//   - what no grid holds stays in global memory, and each pass is a launch.
//
// The quantile is exact whoever selects it, so that the choice may depend on the batch.
#pragma once

#include <algorithm>

#include "cuda_quantile.cuh"

namespace imagen_fast {

constexpr int64_t kValuesOfBlock = 16 << 10;   // more are better shared among blocks
constexpr int64_t kLeastOfBlock = 4 << 10;     // fewer are not
constexpr int64_t kSplitChunk = 32 << 10;      // at most, where each pass is a launch; fewer to fill the device
constexpr int64_t kSelectorShared = 20 << 10;  // bytes: room for SelectorMemory and a kernel's other variables
constexpr int kLargestCluster = 8;

struct TeamPlan {
  bool resident;  // the values are in shared memory
  Team team;
  int64_t blocks;  // of a sample
  int64_t teams;   // samples at a time; all, but for a grid
  int64_t chunk;   // values of a block
  size_t shared_bytes;

  int64_t rounds(int64_t batch) const { return ceil_div(batch, teams); }
};

// `bytes` of shared memory hold a value, and what else is kept of it; chunks are multiples of `unit` values.
inline TeamPlan plan_team(int64_t size, int64_t batch, int bytes, int64_t unit, const DeviceProperties& device) {
  // A span of values that does not begin at a multiple of 16 bytes takes a vector more.
  const int64_t room = (device.shared_bytes_per_block - kSelectorShared) / bytes - 2 * unit;
  const auto chunk_of = [=](int64_t blocks) { return ceil_div(ceil_div(size, blocks), unit) * unit; };
  const auto plan = [=](Team team, int64_t blocks, int64_t teams) {
    const int64_t chunk = chunk_of(blocks);
    return TeamPlan{true, team, blocks, teams, chunk, static_cast<size_t>((chunk + 2 * unit) * bytes)};
  };
  if (size <= room && (size <= kValuesOfBlock || !device.clusters())) return plan(Team::kBlock, 1, batch);
  if (device.clusters()) {
    int64_t blocks = 2;
    while (blocks < kLargestCluster && chunk_of(blocks) > std::min(room, kValuesOfBlock)) blocks *= 2;
    if (chunk_of(blocks) <= room) return plan(Team::kCluster, blocks, batch);
  }
  const int64_t all = device.multiprocessors;
  const int64_t needed = ceil_div(size, room / unit * unit);
  if (needed <= all) {
    const int64_t teams = std::min(batch, all / needed);
    const int64_t blocks = std::max(needed, std::min(all / teams, size / kLeastOfBlock));
    return plan(Team::kGrid, ceil_div(size, chunk_of(blocks)), teams);
  }
  const int64_t to_fill = ceil_div<int64_t>(ceil_div(size, 2 * all), 1024) * 1024;
  const int64_t chunk = std::clamp(to_fill, kLeastOfBlock, kSplitChunk);
  return {false, Team::kGrid, ceil_div(size, chunk), batch, chunk, 0};
}

// The launches that turn the counts of `passes` passes, the first of which is made, into the results
template <typename T>
void launch_passes(const SplitQuantile& s, int64_t batch, int first, LaunchConfig config) {
  config.block = kSelectThreads;
  config.grid = static_cast<unsigned>(batch * s.chunks);
  if (first <= 0) launch(config, count_pass<T, 0>, s);
  if (!s.only_nan) {
    launch(config, count_pass<T, 1>, s);
    launch(config, count_pass<T, 2>, s);
  }
  config.grid = static_cast<unsigned>(batch);
  launch(config, finish_split, s);
}

inline void launch_clear(SampleCounts* counts, int64_t batch, LaunchConfig config) {
  config.block = kSelectThreads;
  config.grid =
      static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(batch * (kCounts + 1), kSelectThreads), 1024));
  launch(config, clear_all_counts, counts, batch);
}

}  // namespace imagen_fast
