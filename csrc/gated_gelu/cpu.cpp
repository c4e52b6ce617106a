// Registers the CPU kernels of gated_gelu. The schemas, and the checks that tell users what to pass instead, are in
// imagen_fast/ops/gated_gelu.py; the checks here keep direct calls of the operators from reading out of bounds.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/cpu_capability.h"
#include "../common/tensor_rows.h"
#include "problem.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void gated_gelu_forward(const gated_gelu::Forward&))
IMAGEN_FAST_DECLARE_KERNEL(void gated_gelu_backward(const gated_gelu::Backward&))

namespace gated_gelu {
namespace {

constexpr const char* kName = "gated_gelu";

// The second half of rows of two parts
template <typename AnyRowViews>
AnyRowViews second_half(const AnyRowViews& rows, const Tensor& packed) {
  const int64_t bytes = packed.size(2) / 2 * static_cast<int64_t>(packed.element_size());
  using Byte = std::conditional_t<std::is_same_v<AnyRowViews, RowViews>, const char, char>;
  return {rows.data ? static_cast<Byte*>(rows.data) + bytes : nullptr, rows.stride_outer, rows.stride_inner};
}

Problem problem(const Tensor& gate, const std::optional<Tensor>& value, bool tanh) {
  Problem p{};
  p.dtype = dtype_of(gate);
  p.tanh = tanh;
  p.gate = rows_of(kName, "gate", gate);
  p.outer = gate.size(0);
  p.inner = gate.size(1);
  p.width = gate.size(2);
  if (value) {
    p.value = rows_like(kName, "value", *value, gate, p.width);
  } else {
    STD_TORCH_CHECK(p.width % 2 == 0, "gated_gelu: gate must have an even last size where there is no value");
    p.value = second_half(p.gate, gate);
    p.width /= 2;
  }
  return p;
}

Tensor forward(const Tensor& gate, const std::optional<Tensor>& value, bool tanh) {
  const Problem p = problem(gate, value, tanh);
  Tensor y = uninitialized_rows_like(gate, p.width);
  if (y.numel() > 0) IMAGEN_FAST_KERNEL(gated_gelu_forward)({p, mutable_rows(y)});
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& gate, const std::optional<Tensor>& value, bool tanh,
                                    int64_t needs) {
  Backward b{problem(gate, value, tanh), {}, {}, {}};
  b.dy = rows_like(kName, "dy", dy, gate, b.width);
  Tensor dgate = needs & 1 ? uninitialized_rows_like(gate, gate.size(2)) : uninitialized_vector(0, dtype_code(gate));
  Tensor dvalue =
      value && needs & 2 ? uninitialized_rows_like(*value, b.width) : uninitialized_vector(0, dtype_code(gate));
  if (needs & 1) b.dgate = mutable_rows(dgate);
  if (value && needs & 2) b.dvalue = mutable_rows(dvalue);
  if (!value) b.dvalue = second_half(b.dgate, gate);
  if (dy.numel() > 0) IMAGEN_FAST_KERNEL(gated_gelu_backward)(b);
  return {dgate, dvalue};
}

}  // namespace
}  // namespace gated_gelu
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("gated_gelu_cpu", TORCH_BOX(&imagen_fast::gated_gelu::forward));
  library.impl("gated_gelu_backward_cpu", TORCH_BOX(&imagen_fast::gated_gelu::backward));
}
