// Stacks, and the switch from one to another: what the emulated threads are made of.
#pragma once

#include <cstddef>

namespace imagen_fast::simt {

// A flow of control that is not running: its stack pointer, and what AddressSanitizer wants to know of its stack.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
};

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kMaxFibers = 1 << 15;

// The memory of all stacks, one after another, reserved at the first use and touched as needed
unsigned char* stacks();
// Whether an address is on one of them: memory that no other thread knows
bool is_on_a_stack(const void* address);

// Fiber number `i`, which will call `entry` on its first switch; `entry` must not return.
Fiber make_fiber(size_t i, void (*entry)());
// Continue `to`, until somebody switches back to `from`.
void switch_fiber(Fiber& from, Fiber& to, bool from_ends = false);
// To be called first in a fiber's `entry`, with the fiber that it was switched from
void fiber_started(Fiber& from);
// Whether fiber number `i` ran past the end of its stack
bool stack_overflowed(size_t i);

}  // namespace imagen_fast::simt
