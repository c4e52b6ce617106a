#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "launch.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace imagen_fast::simt {
namespace {

constexpr size_t kGuard = 128;                       // bytes between variables
constexpr size_t kArena = (228 << 10) + (96 << 10);  // dynamic and static memory of a block with all guards
constexpr size_t kMaxBlocks = 4096;
constexpr unsigned char kGuardByte = 0xa5;

struct Variable {
  const void* key;
  size_t offset;
  size_t bytes;
};

// What the launch under way has found so far; the same in every block.
std::vector<Variable> variables;
size_t used;            // bytes of an arena that are laid out
size_t dynamic_offset;  // where the dynamic shared memory begins
size_t static_bytes;    // of `variables`

unsigned char* arenas() {
  static unsigned char* const memory = [] {
    void* reserved =
        mmap(nullptr, kMaxBlocks * kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) throw std::runtime_error("CUDA emulator: no address space for shared memory");
    return static_cast<unsigned char*>(reserved);
  }();
  return memory;
}

unsigned char* arena(const Block& block) { return arenas() + (&block - grid->blocks.data()) * kArena; }

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void poison([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(address, bytes);
#endif
}

void unpoison([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(address, bytes);
#endif
}

// Make room for a variable between guards. It is aligned as asked and no better, so that luck does not hide anything.
size_t lay_out(size_t bytes, size_t alignment) {
  const size_t offset = round_up(used + kGuard, 2 * alignment) + alignment;
  used = offset + bytes + kGuard;
  if (used > kArena) fail("the kernel has too many shared variables for the emulator");
  return offset;
}

void open_variable(const Block& block, size_t offset, size_t bytes) {
  unpoison(arena(block) + offset, bytes);
  std::memset(arena(block) + offset, 0xff, bytes);
}

void check_guards(const Block& block) {
  const auto check = [&](size_t begin, size_t end, const std::string& what) {
    const unsigned char* base = arena(block);
    const auto written = std::find_if(base + begin, base + end, [](unsigned char c) { return c != kGuardByte; });
    if (written == base + end) return;
    fail("shared memory was written " + std::to_string(written - (base + begin)) + " bytes past the end of " + what);
  };
  const size_t dynamic_end = dynamic_offset + grid->shared_bytes;
  check(dynamic_end, variables.empty() ? dynamic_end + kGuard : variables[0].offset,
        "the " + std::to_string(grid->shared_bytes) + " bytes of dynamic shared memory");
  for (size_t i = 0; i < variables.size(); ++i) {
    const size_t end = variables[i].offset + variables[i].bytes;
    check(end, i + 1 < variables.size() ? variables[i + 1].offset : used,
          "a shared variable of " + std::to_string(variables[i].bytes) + " bytes");
  }
}

}  // namespace

void start_shared_memory() {
  if (grid->blocks.size() > kMaxBlocks) throw std::runtime_error("CUDA emulator: too many blocks at once");
  if (used == 0) {
    dynamic_offset = lay_out(grid->shared_bytes, kDynamicSharedAlignment);
  }
  for (Block& block : grid->blocks) {
    unsigned char* base = arena(block);
    forget_accesses(base, kArena);
    block.shared = base + dynamic_offset;
    unpoison(base, kArena);
    std::memset(base, kGuardByte, std::min(kArena, used + 2 * kStaticLimit));
    poison(base, kArena);
    open_variable(block, dynamic_offset, grid->shared_bytes);
    for (const Variable& variable : variables) open_variable(block, variable.offset, variable.bytes);
  }
}

void end_shared_memory(Block& block) {
  check_remote_accesses(block);
#ifndef __SANITIZE_ADDRESS__
  check_guards(block);
#endif
  // Whoever reads it from now on reads NaN.
  for (const Variable& variable : variables) std::memset(arena(block) + variable.offset, 0xff, variable.bytes);
  std::memset(block.shared, 0xff, grid->shared_bytes);
  poison(arena(block), kArena);
}

void end_all_shared_memory() {
  variables.clear();
  used = static_bytes = 0;
  for (Block& block : grid->blocks) unpoison(arena(block), kArena);
}

Block* shared_memory_owner(const void* address) {
  const size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - arenas());
  return offset < grid->blocks.size() * kArena ? &grid->blocks[offset / kArena] : nullptr;
}

unsigned char* find_shared_variable(const void* key, size_t bytes, size_t alignment) {
  unsigned char* base = arena(*this_thread->block);
  for (const Variable& variable : variables) {
    if (variable.key == key) return base + variable.offset;
  }
  static_bytes += bytes;
  if (static_bytes > kStaticLimit) fail("the kernel's SHARED variables exceed 48 KB; use dynamic shared memory");
  const size_t limit = static_cast<size_t>(device_properties().shared_bytes_per_block);
  if (static_bytes + grid->shared_bytes > limit) {
    fail("the kernel's SHARED variables and " + std::to_string(grid->shared_bytes) +
         " bytes of dynamic shared memory exceed the device's " + std::to_string(limit) + " bytes");
  }
  const size_t offset = lay_out(bytes, alignment);
  variables.push_back({key, offset, bytes});
  for (const Block& block : grid->blocks) {
    if (!block.ended()) open_variable(block, offset, bytes);
  }
  return base + offset;
}

void* map_shared(const void* pointer, unsigned rank) {
  const Block& self = *this_thread->block;
  if (shared_memory_owner(pointer) != &self) fail("map_shared_rank: the pointer is not to this block's shared memory");
  if (rank >= self.cluster->blocks.size()) {
    fail("map_shared_rank: there is no block " + std::to_string(rank) + " in a cluster of " +
         std::to_string(self.cluster->blocks.size()));
  }
  const Block& other = *self.cluster->blocks[rank];
  if (other.ended()) {
    fail("map_shared_rank: block " + std::to_string(rank) +
         " of the cluster has ended, its shared memory is gone; a cluster_sync is missing");
  }
  return arena(other) + (static_cast<const unsigned char*>(pointer) - arena(self));
}

void fail_misaligned(const void* address, size_t alignment, Location where) {
  const size_t offset = reinterpret_cast<uintptr_t>(address) % alignment;
  fail("misaligned access, " + where.text() + ": the address of " + std::to_string(alignment) + " bytes is " +
       std::to_string(offset) + " past a multiple of " + std::to_string(alignment));
}

void start_copy(void* target, const void* source, int bytes, Location where) {
  if (shared_memory_owner(target) != this_thread->block) {
    fail("copy_async_16, " + where.text() + ": the target is not in this block's shared memory");
  }
  if (bytes < 0 || bytes > 16) fail("copy_async_16, " + where.text() + ": 0 to 16 bytes can be valid");
  if (reinterpret_cast<uintptr_t>(target) % 16) fail_misaligned(target, 16, where);
  if (bytes > 0 && reinterpret_cast<uintptr_t>(source) % 16) fail_misaligned(source, 16, where);
  record_access(target, 16, Access::kWrite, __builtin_return_address(0));
  std::memset(target, 0xff, 16);  // until it has been waited for
  this_thread->copies.push_back(
      {static_cast<unsigned char*>(target), static_cast<const unsigned char*>(source), bytes, this_thread->copy_group});
}

void commit_copies() { ++this_thread->copy_group; }

void wait_for_copies(unsigned groups_in_flight) {
  std::vector<PendingCopy>& copies = this_thread->copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group + groups_in_flight < this_thread->copy_group; ++copy) {
    record_access(copy->target, 16, Access::kWrite, __builtin_return_address(0));
    std::memset(copy->target, 0, 16);
    if (copy->bytes == 0) continue;
    record_access(copy->source, static_cast<size_t>(copy->bytes), Access::kRead, __builtin_return_address(0));
    std::memcpy(copy->target, copy->source, static_cast<size_t>(copy->bytes));
  }
  copies.erase(copies.begin(), copy);
}

}  // namespace imagen_fast::simt
