// Shared memory, copies to it, and atomic operations.
//
// A block's shared memory is one arena, so that what is at some place in one block is at the same place in every block
// of its cluster: first the dynamic shared memory, then the variables of SHARED, each between guards.
#pragma once

#include "race.h"
#include "scheduler.h"

// The variable is found by the address of a key, of which each declaration (and instantiation) has one.
#define SHARED(name, ...) SHARED_ALIGNED(alignof(::imagen_fast::SharedType<__VA_ARGS__>), name, __VA_ARGS__)
#define SHARED_ALIGNED(alignment, name, ...)     \
  static char name##_key;                        \
  ::imagen_fast::SharedType<__VA_ARGS__>& name = \
      ::imagen_fast::simt::shared_variable<::imagen_fast::SharedType<__VA_ARGS__>>(&name##_key, alignment)

namespace imagen_fast {

template <typename T>
using SharedType = T;

namespace simt {

constexpr size_t kStaticLimit = 48 << 10;  // bytes of a block's SHARED variables

// Called by the scheduler: all blocks of a gang get memory full of 0xff bytes; one block's is taken away; all of it is.
void start_shared_memory();
void end_shared_memory(Block& block);
void end_all_shared_memory();

// The block of the gang in whose shared memory an address is, or null
Block* shared_memory_owner(const void* address);

unsigned char* find_shared_variable(const void* key, size_t bytes, size_t alignment);
void* map_shared(const void* pointer, unsigned rank);
void start_copy(void* target, const void* source, int bytes, Location where);
void commit_copies();
void wait_for_copies(unsigned groups_in_flight);
[[noreturn]] void fail_misaligned(const void* address, size_t alignment, Location where);

template <typename T>
T& shared_variable(const void* key, size_t alignment) {
  static_assert(std::is_trivially_default_constructible_v<T>, "shared memory is not initialised");
  return *reinterpret_cast<T*>(find_shared_variable(key, sizeof(T), alignment));
}

// Both alone are opaque to -fsanitize=thread, which would take them for accesses that are not atomic.
template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T load_atomic(const T* address) {
  record_access(address, sizeof(T), Access::kAtomic, __builtin_return_address(0));
  return *address;
}
template <typename T>
__attribute__((noinline, no_sanitize("thread"))) void store_atomic(T* address, T value) {
  *address = value;
}

// One thread runs at a time, and it does not wait in here: so this is atomic.
template <typename T, typename Function>
T update(T* address, Function function) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail_misaligned(address, sizeof(T), Location::here());
  const T old = load_atomic(address);
  store_atomic(address, static_cast<T>(function(old)));
  return old;
}

template <typename T>
struct Same {
  using type = T;
};
template <typename T>
using NotDeduced = typename Same<T>::type;

}  // namespace simt

template <typename T>
T* check_aligned(T* pointer, simt::Location where = simt::Location::here()) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) simt::fail_misaligned(pointer, sizeof(T), where);
  return pointer;
}

constexpr int kDynamicSharedAlignment = 128;

template <typename T = unsigned char>
T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::this_thread->block->shared);
}

template <typename T>
T* map_shared_rank(T* pointer, unsigned rank) {
  return static_cast<T*>(simt::map_shared(pointer, rank));
}

inline void copy_async_16(void* shared, const void* global, int valid_bytes = 16,
                          simt::Location where = simt::Location::here()) {
  simt::start_copy(shared, global, valid_bytes, where);
}
inline void copy_async_commit() { simt::commit_copies(); }
template <int groups>
void copy_async_wait() {
  simt::wait_for_copies(groups);
}

}  // namespace imagen_fast

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T atomicAdd(T* address, imagen_fast::simt::NotDeduced<T> value) {
  return imagen_fast::simt::update(address, [value](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* address, imagen_fast::simt::NotDeduced<T> value) {
  return imagen_fast::simt::update(address, [value](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* address, imagen_fast::simt::NotDeduced<T> value) {
  return imagen_fast::simt::update(address, [value](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* address, imagen_fast::simt::NotDeduced<T> value) {
  return imagen_fast::simt::update(address, [value](T old) { return old | value; });
}
template <typename T>
T atomicAnd(T* address, imagen_fast::simt::NotDeduced<T> value) {
  return imagen_fast::simt::update(address, [value](T old) { return old & value; });
}
template <typename T>
T atomicExch(T* address, imagen_fast::simt::NotDeduced<T> value) {
  return imagen_fast::simt::update(address, [value](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, imagen_fast::simt::NotDeduced<T> expected, imagen_fast::simt::NotDeduced<T> value) {
  return imagen_fast::simt::update(address, [=](T old) { return old == expected ? value : old; });
}
// Back to 0 after `limit`
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return imagen_fast::simt::update(address, [limit](unsigned old) { return old >= limit ? 0 : old + 1; });
}
