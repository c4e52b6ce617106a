// Barriers, shuffles and votes under CUDA's names.
#pragma once

#include "scheduler.h"

namespace imagen_fast::simt {

// A shuffle, as seen by one lane: what it gives, from whom it wants, and what it gets
template <typename T>
struct Shuffle {
  T value;
  int source;
  T result;
};

template <typename T>
T shuffle(uint32_t mask, T value, int source, const char* name, Location where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle<T> mine{value, source, value};
  meet(mask, name, where, &mine, [](void* const* records) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!records[lane]) continue;
      auto& to = *static_cast<Shuffle<T>*>(records[lane]);
      // What a lane gets from one that takes no part is undefined.
      if (records[to.source]) {
        to.result = static_cast<Shuffle<T>*>(records[to.source])->value;
      } else {
        std::memset(&to.result, 0xff, sizeof(T));
      }
    }
  });
  return mine.result;
}

// Each lane's vote becomes the ballot.
inline uint32_t ballot(uint32_t mask, bool vote, const char* name, Location where) {
  uint32_t mine = vote;
  meet(mask, name, where, &mine, [](void* const* records) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (records[lane] && *static_cast<uint32_t*>(records[lane])) all |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (records[lane]) *static_cast<uint32_t*>(records[lane]) = all;
    }
  });
  return mine;
}

// Threads of the block whose `vote` is not 0
inline int count_votes(int vote, Location where) {
  Block& block = *this_thread->block;
  this_thread->vote = vote != 0;
  wait(block.barrier, where);
  int count = 0;
  for (const Thread& thread : block.threads) count += thread.vote;
  wait(block.barrier, where);
  return count;
}

}  // namespace imagen_fast::simt

inline void __syncthreads(imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  imagen_fast::simt::wait(imagen_fast::simt::this_thread->block->barrier, where);
}
inline int __syncthreads_count(int vote, imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  return imagen_fast::simt::count_votes(vote, where);
}
inline int __syncthreads_or(int vote, imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  return imagen_fast::simt::count_votes(vote, where) > 0;
}
inline int __syncthreads_and(int vote, imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  return imagen_fast::simt::count_votes(!vote, where) == 0;
}

inline void __syncwarp(uint32_t mask = 0xffffffffu,
                       imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  imagen_fast::simt::sync_warp(mask, where);
}

// Shuffles within segments of `width` lanes, a power of two
template <typename T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
                     imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  const int lane = imagen_fast::simt::this_thread->lane();
  const int from = (lane & ~(width - 1)) | (source & (width - 1));
  return imagen_fast::simt::shuffle(mask, value, from, "__shfl_sync", where);
}
template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32,
                         imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  const int lane = imagen_fast::simt::this_thread->lane();
  const int from = lane ^ lane_mask;
  // To a lower segment the exchange reaches, to a higher one it does not: as the hardware has it.
  return imagen_fast::simt::shuffle(mask, value, from < (lane | (width - 1)) + 1 ? from : lane, "__shfl_xor_sync",
                                    where);
}
template <typename T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                        imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  const int lane = imagen_fast::simt::this_thread->lane();
  const int from = lane - static_cast<int>(delta);
  return imagen_fast::simt::shuffle(mask, value, from >= (lane & ~(width - 1)) ? from : lane, "__shfl_up_sync", where);
}
template <typename T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                          imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  const int lane = imagen_fast::simt::this_thread->lane();
  const int from = lane + static_cast<int>(delta);
  return imagen_fast::simt::shuffle(mask, value, from <= (lane | (width - 1)) ? from : lane, "__shfl_down_sync", where);
}

inline uint32_t __ballot_sync(uint32_t mask, int vote,
                              imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  return imagen_fast::simt::ballot(mask, vote, "__ballot_sync", where);
}
inline int __any_sync(uint32_t mask, int vote,
                      imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  return imagen_fast::simt::ballot(mask, vote, "__any_sync", where) != 0;
}
inline int __all_sync(uint32_t mask, int vote,
                      imagen_fast::simt::Location where = imagen_fast::simt::Location::here()) {
  return imagen_fast::simt::ballot(mask, !vote, "__all_sync", where) == 0;
}

[[noreturn]] inline void __trap() { imagen_fast::simt::fail("__trap"); }

namespace imagen_fast {

inline unsigned cluster_rank() { return simt::this_thread->block->cluster_rank; }
inline unsigned cluster_size() { return simt::grid->cluster; }
inline void cluster_sync(simt::Location where = simt::Location::here()) {
  simt::wait(simt::this_thread->block->cluster->barrier, where);
}

inline void grid_sync(simt::Location where = simt::Location::here()) {
  if (!simt::grid->cooperative) simt::fail("grid_sync, " + where.text() + ": the launch is not cooperative");
  simt::wait(simt::grid->barrier, where);
}

}  // namespace imagen_fast
