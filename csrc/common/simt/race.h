// Data races, in the flavour whose kernels are compiled with -fsanitize=thread: the compiler then reports every access,
// to functions that are ours and not ThreadSanitizer's. In the other flavours nothing is recorded.
#pragma once

#include <cstddef>

namespace imagen_fast::simt {

struct Block;

enum class Access { kRead, kWrite, kAtomic };

#ifdef IMAGEN_FAST_EMULATOR_RACES

// The thread that runs accesses `bytes` at `address`, in the code at `pc`; fails if that races with an earlier access.
void record_access(const void* address, size_t bytes, Access access, const void* pc);

void start_races();                                       // a launch begins: nothing has been accessed
void forget_accesses(const void* address, size_t bytes);  // new memory
void check_remote_accesses(const Block& block);           // `block` ends: does its cluster still use its memory?

#else

inline void record_access(const void*, size_t, Access, const void*) {}
inline void start_races() {}
inline void forget_accesses(const void*, size_t) {}
inline void check_remote_accesses(const Block&) {}

#endif

}  // namespace imagen_fast::simt
