// Registers the CPU kernels of gated_gelu.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cpu_capability.h"
#include "arguments.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void gated_gelu_forward(const gated_gelu::Forward&))
IMAGEN_FAST_DECLARE_KERNEL(void gated_gelu_backward(const gated_gelu::Backward&))

namespace gated_gelu {
namespace {

Tensor forward(const Tensor& gate, const std::optional<Tensor>& value, bool tanh) {
  const Problem p = problem(gate, value, tanh);
  Tensor y = uninitialized_rows_like(gate, p.width);
  if (y.numel() > 0) IMAGEN_FAST_KERNEL(gated_gelu_forward, p.dtype)({p, mutable_rows(y)});
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& gate, const std::optional<Tensor>& value, bool tanh,
                                    int64_t needs) {
  Backward b{problem(gate, value, tanh), {}, {}, {}};
  b.dy = rows_like(kOp, "dy", dy, gate, b.width);
  Tensor dgate = needs & 1 ? uninitialized_rows_like(gate, gate.size(2)) : uninitialized_vector(0, dtype_code(gate));
  Tensor dvalue =
      value && needs & 2 ? uninitialized_rows_like(*value, b.width) : uninitialized_vector(0, dtype_code(gate));
  if (needs & 1) b.dgate = mutable_rows(dgate);
  if (value && needs & 2) b.dvalue = mutable_rows(dvalue);
  if (!value) b.dvalue = second_half(b.dgate, gate);
  if (dy.numel() > 0) IMAGEN_FAST_KERNEL(gated_gelu_backward, b.dtype)(b);
  return {dgate, dvalue};
}

}  // namespace
}  // namespace gated_gelu
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("gated_gelu_cpu", TORCH_BOX(&imagen_fast::gated_gelu::forward));
  library.impl("gated_gelu_backward_cpu", TORCH_BOX(&imagen_fast::gated_gelu::backward));
}
