#include "../common/element_types.h"
#include "../common/quantile.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace {

template <typename T>
void run(const imagen_fast::abs_quantile::Problem& p) {
  using S = AccumulateType<T>;
  const T* x = static_cast<const T*>(p.x);
  S* result = static_cast<S*>(p.result);
  auto some = [&](int64_t begin, int64_t end) {
    Buffer<Key<S>> keys(p.size);
    for (int64_t b = begin; b < end; ++b) result[b] = abs_quantile(x + b * p.stride_b, p.size, p.q, keys.data());
  };
  // All threads on one sample after the other, or a sample each.
  const int64_t threads = num_threads();
  const int64_t rounds = (p.batch + threads - 1) / threads;
  if (p.size > kElementsPerThread && 4 * rounds * threads > 5 * p.batch) {
    some(0, p.batch);
  } else {
    parallel_for(p.batch, p.size, some);
  }
}

}  // namespace

void abs_quantile_kernel(const imagen_fast::abs_quantile::Problem& problem) {
  with_element_type(problem.dtype, [&](auto element) { run<decltype(element)>(problem); });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
