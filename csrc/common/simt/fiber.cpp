#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "The emulator switches stacks in x86-64 assembly; another architecture needs its own switch_stack."
#endif

namespace imagen_fast::simt {
namespace {

constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11;

// Saves the registers that a function must preserve, and continues where the other stack was left.
__attribute__((naked, noinline)) void switch_stack(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm volatile(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n"
      "mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
      "ret\n");
}

}  // namespace

unsigned char* stacks() {
  static unsigned char* const memory = [] {
    // One more in front, for the first one to run over into
    void* reserved = mmap(nullptr, (1 + kMaxFibers) * kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) throw std::runtime_error("CUDA emulator: no address space for stacks");
    return static_cast<unsigned char*>(reserved) + kStackBytes;
  }();
  return memory;
}

bool is_on_a_stack(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(stacks()) < kMaxFibers * kStackBytes;
}

Fiber make_fiber(size_t i, void (*entry)()) {
  Fiber fiber;
  unsigned char* bottom = stacks() + i * kStackBytes;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(bottom, kStackBytes);  // what an abandoned fiber left
#endif
  std::memcpy(bottom, &kCanary, sizeof(kCanary));
  // Stacks that all began at the same offset in a page would compete for the same lines of the cache.
  const size_t offset = 64 * (i % 61);
  uint64_t* top = reinterpret_cast<uint64_t*>(bottom + kStackBytes - offset) - 8;
  std::memset(top - 8, 0, 16 * sizeof(*top));
  // What switch_stack pops: six registers, then where to go. A function is entered with a stack pointer that is 8 away
  // from a multiple of 16.
  top[0] = reinterpret_cast<uint64_t>(entry);
  fiber.stack_pointer = top - 6;
  fiber.bottom = bottom;
  fiber.size = kStackBytes;
  return fiber;
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool from_ends) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
  switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_started([[maybe_unused]] Fiber& from) {
#ifdef __SANITIZE_ADDRESS__
  // `from` is the main stack, whose bounds are known only here.
  __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
#endif
}

bool stack_overflowed(size_t i) { return std::memcmp(stacks() + i * kStackBytes, &kCanary, sizeof(kCanary)) != 0; }

}  // namespace imagen_fast::simt
