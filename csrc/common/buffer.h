// Scratch memory of the CPU kernels. (std::vector would leave weak symbols in the objects of every instruction set.)
#pragma once

#include <cstdint>
#include <cstdlib>
#include <type_traits>

namespace imagen_fast {

// Raises a Python error. It may be called in the body of a parallel_for, which passes the exception on.
[[noreturn]] void raise_out_of_memory(size_t bytes);

}  // namespace imagen_fast

#ifdef IMAGEN_FAST_ISA
namespace imagen_fast::IMAGEN_FAST_ISA {

// n uninitialised elements, aligned to a cache line, freed at the end of the scope.
template <typename T>
class Buffer {
  static_assert(std::is_trivial_v<T>);

 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, bytes(n)))) {
    if (!data_) raise_out_of_memory(bytes(n));
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  static size_t bytes(int64_t n) { return (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64 + 64; }

  T* data_;
};

}  // namespace imagen_fast::IMAGEN_FAST_ISA
#endif
