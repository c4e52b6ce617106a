// What the operators of the CPU and of CUDA make of their arguments. The schemas, and the checks that tell users what
// to pass instead, are in imagen_fast/ops/gated_gelu.py; the checks here keep direct calls of the operators from
// reading out of bounds.
#pragma once

#include <optional>
#include <type_traits>

#include "../common/tensor_rows.h"
#include "problem.h"

namespace imagen_fast::gated_gelu {

constexpr const char* kOp = "gated_gelu";

// The second half of rows of two parts
template <typename AnyRowViews>
AnyRowViews second_half(const AnyRowViews& rows, const Tensor& packed) {
  const int64_t bytes = packed.size(2) / 2 * static_cast<int64_t>(packed.element_size());
  using Byte = std::conditional_t<std::is_same_v<AnyRowViews, RowViews>, const char, char>;
  return {rows.data ? static_cast<Byte*>(rows.data) + bytes : nullptr, rows.stride_outer, rows.stride_inner};
}

inline Problem problem(const Tensor& gate, const std::optional<Tensor>& value, bool tanh) {
  Problem p{};
  p.dtype = dtype_of(gate);
  p.tanh = tanh;
  p.gate = rows_of(kOp, "gate", gate);
  p.outer = gate.size(0);
  p.inner = gate.size(1);
  p.width = gate.size(2);
  if (value) {
    p.value = rows_like(kOp, "value", *value, gate, p.width);
  } else {
    STD_TORCH_CHECK(p.width % 2 == 0, kOp, ": gate must have an even last size where there is no value");
    p.value = second_half(p.gate, gate);
    p.width /= 2;
  }
  return p;
}

}  // namespace imagen_fast::gated_gelu
