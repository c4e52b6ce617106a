// PyTorch's thread pool, without a torch header: the CPU kernels may not include one (see number_formats.h).
#pragma once

#include <cstdint>
#include <type_traits>

namespace imagen_fast {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// Splits [0, n) into ranges of at least `grain`, one per thread. A single range runs in the calling thread.
void parallel_for(int64_t n, int64_t grain, ParallelBody body, void* context);

int64_t num_threads();

}  // namespace imagen_fast

#ifdef IMAGEN_FAST_ISA
namespace imagen_fast::IMAGEN_FAST_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(begin, end) over [0, n). A thread is worth waking for about this many elements of a tensor.
constexpr int64_t kElementsPerThread = 16384;

template <typename Body>
inline void parallel_for(int64_t n, int64_t elements_per_task, Body&& body) {
  if (n <= 0) return;
  const int64_t grain = ceil_div(kElementsPerThread, elements_per_task);
  if (n <= grain) return body(int64_t{0}, n);
  auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
  };
  imagen_fast::parallel_for(n, grain, call, &body);
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
#endif
