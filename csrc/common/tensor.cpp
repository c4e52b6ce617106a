// For tests: outputs full of NaN until a kernel writes them, and an operator that shows that they are.
#include "tensor.h"

#include <torch/csrc/stable/library.h>

namespace imagen_fast {

std::atomic<bool> poison_outputs{false};

namespace {

void set_poison_outputs(bool on) { poison_outputs.store(on, std::memory_order_relaxed); }

Tensor unwritten_output(int64_t size) { return uninitialized_matrix(1, size, aoti_torch_dtype_float32()); }

}  // namespace
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CompositeExplicitAutograd, library) {
  library.impl("_poison_outputs", TORCH_BOX(&imagen_fast::set_poison_outputs));
  library.impl("_unwritten_output", TORCH_BOX(&imagen_fast::unwritten_output));
}
