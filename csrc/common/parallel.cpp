#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>

namespace imagen_fast {

void parallel_for(int64_t n, int64_t grain, ParallelBody body, void* context) {
  // What PyTorch itself would pass on of an exception is where it came by, and not what it says.
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end, context);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace imagen_fast
