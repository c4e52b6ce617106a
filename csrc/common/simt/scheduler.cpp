#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <stdexcept>

#include "memory.h"
#include "race.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace imagen_fast::simt {

Grid* grid = nullptr;
Thread* this_thread = nullptr;

namespace {

Fiber scheduler;
std::deque<Thread*> ready;

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(const Thread& thread) {
  return "thread " + text(thread.index) + " of block " + text(thread.block->index);
}

uint3 unravel(unsigned i, dim3 shape) { return {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y}; }

// Hand over to the scheduler until somebody makes this thread ready.
void suspend(const char* reason, Location where) {
  Thread* self = this_thread;
  self->waits_for = reason;
  self->where = where;
  switch_fiber(self->fiber, scheduler);
}

void wake(Thread* thread) {
  thread->waits_for = nullptr;
  ready.push_back(thread);
}

// ---- Meetings of a warp

void end_meeting(Warp& warp, size_t i) {
  const Meeting meeting = warp.meetings[i];
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(i));
  meeting.complete(meeting.records);
  for (int lane = 0; lane < 32; ++lane) {
    if (meeting.arrived >> lane & 1 && warp.lanes[lane] != this_thread) wake(warp.lanes[lane]);
  }
}

bool all_are_here(const Warp& warp, const Meeting& meeting) {
  return (meeting.mask & warp.running & ~meeting.arrived) == 0;
}

// ---- The life of a thread

void leave(Barrier& barrier) {
  ++barrier.returned;
  if (!barrier.waiting.empty()) {
    fail("this thread has returned, but " + std::to_string(barrier.waiting.size()) + " threads wait for it at " +
         barrier.name + ", " + barrier.where.text());
  }
}

void finish_thread() {
  Thread& self = *this_thread;
  self.returned = true;
  self.warp->running &= ~(1u << self.lane());
  leave(self.block->barrier);
  leave(self.block->cluster->barrier);
  leave(grid->barrier);
  for (size_t i = self.warp->meetings.size(); i-- > 0;) {
    if (all_are_here(*self.warp, self.warp->meetings[i])) end_meeting(*self.warp, i);
  }
  if (--self.block->running == 0) end_shared_memory(*self.block);
}

void thread_main() {
  fiber_started(scheduler);
  grid->kernel();
  finish_thread();
  switch_fiber(this_thread->fiber, scheduler, true);
}

// ---- The gang: the blocks that exist together

void start_block(Block& block, unsigned number, size_t first_fiber) {
  const dim3 shape = grid->block;
  const size_t threads = static_cast<size_t>(shape.x) * shape.y * shape.z;
  block.number = number;
  block.index = unravel(number, grid->grid);
  block.threads.resize(threads);
  block.warps.resize((threads + 31) / 32);
  block.barrier.members = block.running = threads;
  for (size_t i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    thread.number = first_fiber + i;
    thread.fiber = make_fiber(thread.number, thread_main);
    thread.block = &block;
    thread.warp = &block.warps[i / 32];
    thread.rank = static_cast<int>(i);
    thread.index = unravel(static_cast<unsigned>(i), shape);
    thread.warp->lanes[i % 32] = &thread;
    thread.warp->running |= 1u << (i % 32);
  }
}

void start_gang(unsigned first_block, unsigned blocks) {
  grid->blocks = std::vector<Block>(blocks);
  grid->clusters = std::vector<Cluster>(blocks / grid->cluster);
  grid->barrier = Barrier{"grid_sync"};
  size_t fibers = 0;
  for (unsigned i = 0; i < blocks; ++i) {
    Block& block = grid->blocks[i];
    start_block(block, first_block + i, fibers);
    fibers += block.threads.size();
    block.cluster = &grid->clusters[i / grid->cluster];
    block.cluster->number = block.number / grid->cluster;
    block.cluster_rank = i % grid->cluster;
    block.cluster->blocks.push_back(&block);
    block.cluster->barrier.members += block.threads.size();
    grid->barrier.members += block.threads.size();
  }
  start_shared_memory();
}

void fill_ready(Order order, std::mt19937_64& random) {
  ready.clear();
  for (Block& block : grid->blocks) {
    for (Thread& thread : block.threads) ready.push_back(&thread);
  }
  if (order == Order::kReverse) std::reverse(ready.begin(), ready.end());
  if (order == Order::kRandom) std::shuffle(ready.begin(), ready.end(), random);
}

void run_thread(Thread* thread) {
  this_thread = thread;
  threadIdx = thread->index;
  blockIdx = thread->block->index;
  switch_fiber(scheduler, thread->fiber);
  this_thread = nullptr;
  if (grid->error.empty() && stack_overflowed(thread->number)) {
    grid->error = text(*thread) + " needs more stack than the emulator gives it";
  }
}

// Nobody is ready and some have not returned: who waits where?
std::string deadlock() {
  std::map<std::string, std::vector<const Thread*>> waiting;
  for (const Block& block : grid->blocks) {
    for (const Thread& thread : block.threads) {
      if (thread.waits_for) waiting[thread.waits_for + (", " + thread.where.text())].push_back(&thread);
    }
  }
  std::string report = "deadlock";
  for (const auto& [place, threads] : waiting) {
    report +=
        "; " + std::to_string(threads.size()) + " threads wait at " + place + ", the first is " + text(*threads[0]);
  }
  return report;
}

void run_gang(Order order, std::mt19937_64& random) {
  fill_ready(order, random);
  while (grid->error.empty() && !ready.empty()) {
    Thread* next = ready.front();
    ready.pop_front();
    run_thread(next);
  }
  const bool all_ended = std::all_of(grid->blocks.begin(), grid->blocks.end(), [](auto& b) { return b.ended(); });
  if (grid->error.empty() && !all_ended) grid->error = deadlock();
}

}  // namespace

void run(Grid& launch, Order order, uint64_t seed) {
  grid = &launch;
  gridDim = launch.grid;
  blockDim = launch.block;
  std::mt19937_64 random(seed);
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  const unsigned gang = launch.cooperative ? blocks : launch.cluster;
  std::vector<unsigned> gangs(blocks / gang);
  for (unsigned i = 0; i < gangs.size(); ++i) gangs[i] = i;
  if (order == Order::kReverse) std::reverse(gangs.begin(), gangs.end());
  if (order == Order::kRandom) std::shuffle(gangs.begin(), gangs.end(), random);
  start_races();
  for (size_t i = 0; i < gangs.size() && launch.error.empty(); ++i) {
    start_gang(gangs[i] * gang, gang);
    run_gang(order, random);
  }
  end_all_shared_memory();
  grid = nullptr;
  if (!launch.error.empty()) throw std::runtime_error("CUDA emulator: " + launch.error);
}

bool Location::operator==(const Location& other) const {
  return line == other.line && std::strcmp(file, other.file) == 0;
}

std::string Location::text() const { return std::string(file) + ":" + std::to_string(line); }

void fail(const std::string& message) {
  if (!this_thread) throw std::runtime_error("CUDA emulator: " + message);
  grid->error = message + " [" + text(*this_thread) + "]";
  switch_fiber(this_thread->fiber, scheduler, true);
  __builtin_unreachable();  // the scheduler abandons all threads
}

void wait(Barrier& barrier, Location where) {
  if (barrier.returned > 0) {
    fail(std::string(barrier.name) + ", " + where.text() + ": " + std::to_string(barrier.returned) +
         " threads have returned and will never arrive");
  }
  if (!barrier.waiting.empty() && !(barrier.where == where)) {
    fail(std::string("divergent ") + barrier.name + ": this thread is at " + where.text() + ", " +
         std::to_string(barrier.waiting.size()) + " others wait at " + barrier.where.text());
  }
  barrier.where = this_thread->where = where;
  barrier.waiting.push_back(this_thread);
  if (barrier.waiting.size() < barrier.members) return suspend(barrier.name, where);
  ++barrier.passed;
  std::vector<Thread*> all;
  all.swap(barrier.waiting);
  for (Thread* thread : all) {
    thread->moment = 0;
    if (thread != this_thread) wake(thread);
  }
}

void meet(uint32_t mask, const char* name, Location where, void* record, void (*complete)(void* const* records)) {
  Warp& warp = *this_thread->warp;
  const uint32_t self = 1u << this_thread->lane();
  if (!(mask & self)) fail(std::string(name) + ", " + where.text() + ": the calling lane is not in the mask");
  this_thread->where = where;
  size_t i = 0;
  while (i < warp.meetings.size() && warp.meetings[i].mask != mask) ++i;
  if (i == warp.meetings.size()) warp.meetings.push_back(Meeting{mask, name, where, complete});
  Meeting& meeting = warp.meetings[i];
  if (std::strcmp(meeting.name, name) != 0 || !(meeting.where == where)) {
    fail(std::string("the lanes of a warp disagree: this one is in ") + name + ", " + where.text() +
         ", others are in " + meeting.name + ", " + meeting.where.text());
  }
  meeting.arrived |= self;
  meeting.records[this_thread->lane()] = record;
  if (!all_are_here(warp, meeting)) return suspend(name, where);
  end_meeting(warp, i);
}

void sync_warp(uint32_t mask, Location where) {
  meet(mask, "__syncwarp", where, this_thread, [](void* const* records) {
    uint32_t synced = 0;  // of the warp, by now
    for (int lane = 0; lane < 32; ++lane) {
      if (!records[lane]) continue;
      Thread& thread = *static_cast<Thread*>(records[lane]);
      if (!synced) synced = ++thread.warp->synced;
      thread.synced = synced;
      thread.moment = 0;
    }
  });
}

}  // namespace imagen_fast::simt
