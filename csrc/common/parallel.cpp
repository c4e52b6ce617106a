#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace imagen_fast {

void parallel_for(int64_t n, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace imagen_fast
