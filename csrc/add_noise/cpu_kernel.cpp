#include "../common/element_types.h"
#include "../common/parallel.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace {

constexpr int64_t kRow = 1024;  // elements

template <typename T>
void run(const imagen_fast::add_noise::Problem& problem) {
  using S = AccumulateType<T>;
  const int64_t blocks = (problem.positions + kRow - 1) / kRow;
  const int64_t rows = blocks * problem.channels;  // of a sample
  const int64_t row_size = problem.positions < kRow ? problem.positions : kRow;
  parallel_for(problem.batch * rows, row_size, [&](int64_t begin, int64_t end) {
    alignas(64) S x0_scratch[kRow], noise_scratch[kRow], y_scratch[kRow];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / rows, c = i % problem.channels, p = i % rows / problem.channels * kRow;
      const int64_t n = problem.positions - p < kRow ? problem.positions - p : kRow;
      const S* x0 = read_row<T>(problem.x0, b, c, p, n, x0_scratch);
      const S* noise = read_row<T>(problem.noise, b, c, p, n, noise_scratch);
      S* in_place = row_in_place<T, S>(problem.y, b, c, p);
      S* y = in_place ? in_place : y_scratch;
      const S signal = static_cast<S>(problem.signal[b]), deviation = static_cast<S>(problem.deviation[b]);
      for_each_vector<S>(n, [&](int64_t k, auto lanes) {
        using V = typename decltype(lanes)::V;
        store(fma(V(load(x0 + k, lanes)), V(signal), V(load(noise + k, lanes)) * V(deviation)), y + k, lanes);
      });
      if (!in_place) write_row<T>(y, problem.y, b, c, p, n);
    }
  });
}

}  // namespace

void add_noise_kernel(const imagen_fast::add_noise::Problem& problem) {
  with_element_type(problem.dtype, [&](auto element) { run<decltype(element)>(problem); });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
