// Every byte that kernels access has a cell with its last writer and two of its readers since then. Who they were and
// when is a moment: a thread, between one synchronisation and its next. Two accesses race unless one thread makes both,
// both are atomic, or the earlier one's moment came before a barrier (or __syncwarp) that both threads have passed, or
// before an atomic operation whose variable the later thread's block has since operated on.
//
// It is exact for barriers. It lets pass what three readers of a byte hide, and takes a __syncwarp of part of a warp
// for one of all who call any.
#ifdef IMAGEN_FAST_EMULATOR_RACES

#include "race.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <memory>
#include <unordered_map>

#include "memory.h"
#include "scheduler.h"

namespace imagen_fast::simt {
namespace {

struct Moment {
  uint32_t thread, warp, block, cluster;                            // numbers in the grid
  uint32_t warp_synced, block_passed, cluster_passed, grid_passed;  // when
  uint3 thread_index, block_index;                                  // for reports
};

// A moment's number and whether the access was atomic, in one word; 0 is nobody.
using Who = uint32_t;
Who who(uint32_t moment, bool atomic) { return moment << 1 | (atomic ? 1 : 0); }

struct Cell {
  Who writer = 0;
  uint32_t writer_pc = 0;  // from the start of the library
  Who readers[2] = {};
};

constexpr uintptr_t kPage = 4096;
using Page = std::array<Cell, kPage>;

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t latest_key;
Page* latest_page;
std::vector<Moment> moments;

// What is known to have happened: all of a block before a number of its barriers, all of a thread up to a moment
struct Knowledge {
  std::unordered_map<uint32_t, uint32_t> block_passed;
  std::unordered_map<uint32_t, uint32_t> thread_moment;

  void learn(const Knowledge& other) {
    for (const auto& [block, passed] : other.block_passed) raise(block_passed[block], passed);
    for (const auto& [thread, moment] : other.thread_moment) raise(thread_moment[thread], moment);
  }
  static void raise(uint32_t& value, uint32_t to) { value = value < to ? to : value; }
};
std::unordered_map<const void*, Knowledge> released;  // by atomic variable
std::unordered_map<uint32_t, Knowledge> acquired;     // by block

Cell& cell(uintptr_t address) {
  if (address / kPage != latest_key || !latest_page) {
    latest_key = address / kPage;
    auto& page = pages[latest_key];
    if (!page) page = std::make_unique<Page>();
    latest_page = page.get();
  }
  return (*latest_page)[address % kPage];
}

uint32_t thread_number(const Thread& thread) {
  return thread.block->number * static_cast<uint32_t>(thread.block->threads.size()) +
         static_cast<uint32_t>(thread.rank);
}

uint32_t moment_of(Thread& thread) {
  if (thread.moment == 0) {
    const Block& block = *thread.block;
    const uint32_t warps = static_cast<uint32_t>(block.warps.size());
    thread.moment = static_cast<uint32_t>(moments.size());
    moments.push_back({thread_number(thread), block.number * warps + static_cast<uint32_t>(thread.rank / 32),
                       block.number, block.cluster->number, thread.synced, block.barrier.passed,
                       block.cluster->barrier.passed, grid->barrier.passed, thread.index, block.index});
  }
  return thread.moment;
}

bool is_before(Who earlier, Who now) {
  const Moment& a = moments[earlier >> 1];
  const Moment& b = moments[now >> 1];
  if (a.thread == b.thread || (earlier & now & 1)) return true;
  if (a.grid_passed < b.grid_passed) return true;
  if (a.cluster == b.cluster && a.cluster_passed < b.cluster_passed) return true;
  if (a.block == b.block && a.block_passed < b.block_passed) return true;
  if (a.warp == b.warp && a.warp_synced < b.warp_synced) return true;
  const auto known = acquired.find(b.block);
  if (known == acquired.end()) return false;
  const auto passed = known->second.block_passed.find(a.block);
  if (passed != known->second.block_passed.end() && a.block_passed < passed->second) return true;
  const auto moment = known->second.thread_moment.find(a.thread);
  return moment != known->second.thread_moment.end() && (earlier >> 1) <= moment->second;
}

// An atomic operation passes on what is known through its variable.
void exchange_knowledge(const void* variable, Thread& thread) {
  const uint32_t moment = moment_of(thread);
  Knowledge& ours = acquired[thread.block->number];
  Knowledge& theirs = released[variable];
  ours.learn(theirs);
  theirs.learn(ours);
  Knowledge::raise(theirs.block_passed[thread.block->number], thread.block->barrier.passed);
  Knowledge::raise(theirs.thread_moment[thread_number(thread)], moment);
}

// ---- Reports

uintptr_t library_start() {
  static const uintptr_t start = [] {
    Dl_info info;
    return dladdr(reinterpret_cast<void*>(&record_access), &info) ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
  }();
  return start;
}

// The line of a return address, by addr2line of the compiler's binutils
std::string line_of(uintptr_t pc) {
  Dl_info info;
  char offset[32];
  std::snprintf(offset, sizeof(offset), "0x%zx", pc - library_start() - 1);
  std::string line;
  if (dladdr(reinterpret_cast<void*>(&record_access), &info)) {
    const std::string command = std::string("addr2line -e '") + info.dli_fname + "' " + offset + " 2>/dev/null";
    if (FILE* pipe = popen(command.c_str(), "r")) {
      char buffer[1024];
      if (std::fgets(buffer, sizeof(buffer), pipe)) line = buffer;
      pclose(pipe);
    }
  }
  const size_t end = line.find_first_of(" \n");
  return line.empty() || line[0] == '?' ? std::string("code at ") + offset : line.substr(0, end);
}

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

[[noreturn]] void report(const Cell& at, Who other, bool other_writes, uintptr_t address, Access access,
                         const void* pc) {
  const Moment& moment = moments[other >> 1];
  std::string place = "memory";
  if (const Block* owner = shared_memory_owner(reinterpret_cast<void*>(address))) {
    place = "shared memory at offset " + std::to_string(address - reinterpret_cast<uintptr_t>(owner->shared));
  }
  fail("data race on " + place + ": " + (access == Access::kRead ? "read" : "written") + " at " +
       line_of(reinterpret_cast<uintptr_t>(pc)) + ", " + (other_writes ? "written" : "read") + " by thread " +
       text(moment.thread_index) + " of block " + text(moment.block_index) +
       (other_writes ? " at " + line_of(library_start() + at.writer_pc) : std::string()) +
       ", and nothing orders the two");
}

void check_remote_access(const void* address) {
  Block* owner = shared_memory_owner(address);
  Block& self = *this_thread->block;
  if (!owner || owner == &self) return;
  const std::string name = "shared memory of block " + std::to_string(owner->cluster_rank) + " of the cluster";
  if (owner->ended()) fail(name + " is accessed after that block has ended; a cluster_sync is missing");
  const uint32_t passed = self.cluster->barrier.passed;
  if (passed == 0) fail(name + " is accessed before any cluster_sync: that block may not have started");
  owner->last_remote_access = 1 + passed;
}

__attribute__((noinline)) void check_byte(uintptr_t address, Who now, Access access, const void* pc) {
  Cell& at = cell(address);
  if (at.writer && !is_before(at.writer, now)) report(at, at.writer, true, address, access, pc);
  if (access == Access::kRead) {
    Who& reader = at.readers[0] && !is_before(at.readers[0], now) ? at.readers[1] : at.readers[0];
    reader = now;
    return;
  }
  for (Who& reader : at.readers) {
    if (reader && !is_before(reader, now)) report(at, reader, false, address, access, pc);
    reader = 0;
  }
  at.writer = now;
  at.writer_pc = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - library_start());
}

}  // namespace

void record_access(const void* address, size_t bytes, Access access, const void* pc) {
  if (!this_thread || is_on_a_stack(address)) return;
  check_remote_access(address);
  if (access == Access::kAtomic) exchange_knowledge(address, *this_thread);
  const Who now = who(moment_of(*this_thread), access == Access::kAtomic);
  for (size_t i = 0; i < bytes; ++i) check_byte(reinterpret_cast<uintptr_t>(address) + i, now, access, pc);
  if (access == Access::kAtomic) this_thread->moment = 0;  // what it does from now on is not released yet
}

void start_races() {
  pages.clear();
  latest_page = nullptr;
  moments.assign(1, Moment{});
  released.clear();
  acquired.clear();
}

void forget_accesses(const void* address, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address) / kPage;
  for (uintptr_t page = begin; page < begin + bytes / kPage; ++page) pages.erase(page);
  latest_page = nullptr;
}

void check_remote_accesses(const Block& block) {
  if (block.last_remote_access == 1 + block.cluster->barrier.passed) {
    fail("this block ends, but another of its cluster has accessed its shared memory since the latest cluster_sync");
  }
}

}  // namespace imagen_fast::simt

// ---- What the compiler calls

using imagen_fast::simt::Access;
using imagen_fast::simt::record_access;

#define IMAGEN_FAST_HOOK(name, bytes, access)                                   \
  extern "C" void __tsan_##name(void* address) {                                \
    record_access(address, bytes, Access::access, __builtin_return_address(0)); \
  }
#define IMAGEN_FAST_HOOKS(bytes)                        \
  IMAGEN_FAST_HOOK(read##bytes, bytes, kRead)           \
  IMAGEN_FAST_HOOK(write##bytes, bytes, kWrite)         \
  IMAGEN_FAST_HOOK(unaligned_read##bytes, bytes, kRead) \
  IMAGEN_FAST_HOOK(unaligned_write##bytes, bytes, kWrite)
IMAGEN_FAST_HOOKS(1)
IMAGEN_FAST_HOOKS(2)
IMAGEN_FAST_HOOKS(4)
IMAGEN_FAST_HOOKS(8)
IMAGEN_FAST_HOOKS(16)

extern "C" {
void __tsan_read_range(void* address, unsigned long bytes) {
  record_access(address, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  record_access(address, bytes, Access::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}

// What the host's code in the same files does with atomic variables, such as counts of references
int __tsan_atomic32_load(const int* a, int) { return __atomic_load_n(a, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(int* a, int value, int) { __atomic_store_n(a, value, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(int* a, int value, int) { return __atomic_fetch_add(a, value, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_sub(int* a, int value, int) { return __atomic_fetch_sub(a, value, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_load(const long* a, int) { return __atomic_load_n(a, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_fetch_add(long* a, long value, int) { return __atomic_fetch_add(a, value, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_fetch_sub(long* a, long value, int) { return __atomic_fetch_sub(a, value, __ATOMIC_SEQ_CST); }
char __tsan_atomic8_load(const char* a, int) { return __atomic_load_n(a, __ATOMIC_SEQ_CST); }
void __tsan_atomic8_store(char* a, char value, int) { __atomic_store_n(a, value, __ATOMIC_SEQ_CST); }
}

#endif  // IMAGEN_FAST_EMULATOR_RACES
