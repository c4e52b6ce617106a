// Who runs and who waits: the grid's blocks, clusters, warps and threads, and the places where they meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "fiber.h"
#include "names.h"

// Of the thread that runs
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace imagen_fast::simt {

// A line of the kernel, for reports. As the default argument of a wrapper it is the caller's.
struct Location {
  const char* file = nullptr;
  int line = 0;
  static Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Location& other) const;
  std::string text() const;
};

struct Block;
struct Thread;

// A barrier of a fixed set of threads. All must arrive, and at the same line.
struct Barrier {
  const char* name;
  size_t members = 0;
  size_t returned = 0;  // members that will never arrive
  std::vector<Thread*> waiting{};
  Location where{};     // of those who wait
  uint32_t passed = 0;  // how often all were here
};

// The lanes of a mask on their way into one warp function: each leaves a record, and the last one does it for all.
struct Meeting {
  uint32_t mask;
  const char* name;
  Location where;
  void (*complete)(void* const* records);  // by lane; null for lanes that do not take part
  uint32_t arrived = 0;
  void* records[32] = {};
};

struct Warp {
  Thread* lanes[32] = {};
  uint32_t running = 0;  // lanes that have not returned
  uint32_t synced = 0;   // how often __syncwarp was passed
  std::vector<Meeting> meetings{};
};

struct Cluster {
  unsigned number = 0;
  std::vector<Block*> blocks{};
  Barrier barrier{"cluster_sync"};
};

// A copy by cp.async that has not been waited for
struct PendingCopy {
  unsigned char* target;
  const unsigned char* source;
  int bytes;  // of the source; the rest of the 16 is zero
  unsigned group;
};

struct Thread {
  Fiber fiber{};
  size_t number = 0;  // of its fiber
  Block* block = nullptr;
  Warp* warp = nullptr;
  int rank = 0;  // in the block
  uint3 index{};
  bool returned = false;
  int vote = 0;
  const char* waits_for = nullptr;
  Location where{};         // where it waits or last waited
  unsigned copy_group = 0;  // the one that the next copy will belong to
  std::vector<PendingCopy> copies{};
  uint32_t synced = 0;  // Warp::synced at its latest __syncwarp
  uint32_t moment = 0;  // race.h

  int lane() const { return rank % 32; }
};

struct Block {
  unsigned number = 0;  // in the grid
  uint3 index{};
  Cluster* cluster = nullptr;
  unsigned cluster_rank = 0;
  unsigned char* shared = nullptr;  // memory.h
  std::vector<Thread> threads{};
  std::vector<Warp> warps{};
  Barrier barrier{"__syncthreads"};
  uint32_t last_remote_access = 0;  // race.h: 1 + Cluster::barrier.passed at another block's latest access; 0: none
  size_t running = 0;

  bool ended() const { return running == 0; }
};

enum class Order { kForward, kReverse, kRandom };

// The launch that is under way. Of its blocks, those of one gang exist at a time: one block, the blocks of one cluster,
// or all of a cooperative launch.
struct Grid {
  std::function<void()> kernel;
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;

  std::vector<Block> blocks{};  // the gang's
  std::vector<Cluster> clusters{};
  Barrier barrier{"grid_sync"};
  std::string error{};
};

extern Grid* grid;           // null when nothing runs
extern Thread* this_thread;  // null outside of kernels

// Run all of a grid. Throws std::runtime_error with whatever was found wrong; abandons the kernel's threads then.
void run(Grid& launch, Order order, uint64_t seed);

// ---- For the wrappers, in a thread that runs

// Stop the launch with this message, or, outside of a kernel, throw it.
[[noreturn]] void fail(const std::string& message);

void wait(Barrier& barrier, Location where);
void sync_warp(uint32_t mask, Location where);

// A warp function: all lanes of `mask` call it with the same arguments but their own records.
void meet(uint32_t mask, const char* name, Location where, void* record, void (*complete)(void* const* records));

}  // namespace imagen_fast::simt
