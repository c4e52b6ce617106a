// Registers the product on packed weights. The schemas are in imagen_fast/ops/_packed_linear.py; the checks here keep
// direct calls of the operators from reading out of bounds.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../common/cpu_capability.h"
#include "../common/tensor_rows.h"
#include "problem.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void packed_linear_pack(const packed_linear::Pack&))
IMAGEN_FAST_DECLARE_KERNEL(void packed_linear_forward(const packed_linear::Forward&))

namespace packed_linear {
namespace {

constexpr const char* kName = "packed_linear";

int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

void check_bfloat16(const Tensor& tensor) {
  STD_TORCH_CHECK(dtype_of(tensor) == DType::kBFloat16, "packed_linear: it takes bfloat16 alone");
}

Tensor pack(const Tensor& weight) {
  check_bfloat16(weight);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.stride(1) == 1, "packed_linear: weight must be (columns, terms), dense");
  const int64_t columns = weight.size(0), terms = weight.size(1);
  STD_TORCH_CHECK(columns > 0 && terms > 0 && terms % 2 == 0, "packed_linear: weight must have an even last size");
  Tensor packed = uninitialized_matrix(panels(columns), kPanel * terms, dtype_code(weight));
  IMAGEN_FAST_KERNEL_OF(packed_linear_pack, cpu_capability())
  ({static_cast<const BFloat16*>(weight.const_data_ptr()), weight.stride(0), columns, terms,
    static_cast<BFloat16*>(packed.mutable_data_ptr())});
  return packed;
}

Tensor forward(const Tensor& x, const Tensor& packed, int64_t columns, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& add, const std::optional<Tensor>& more) {
  check_bfloat16(x);
  check_bfloat16(packed);
  Forward f{};
  f.x = rows_of(kName, "x", x);
  f.outer = x.size(0);
  f.inner = x.size(1);
  f.terms = x.size(2);
  if (more) {
    check_bfloat16(*more);
    f.more_terms = more->dim() == 3 ? more->size(2) : 0;
    STD_TORCH_CHECK(f.terms % 2 == 0 && f.more_terms > 0 && f.more_terms % 2 == 0,
                    "packed_linear: x and more must have an even last size");
    f.more = rows_like(kName, "more", *more, x, f.more_terms);
  }
  const int64_t terms = f.terms + f.more_terms;
  f.columns = columns;
  STD_TORCH_CHECK(packed.dim() == 2 && columns > 0 && packed.size(0) == panels(columns) &&
                      packed.size(1) == kPanel * terms && packed.stride(1) == 1 && packed.stride(0) == packed.size(1),
                  "packed_linear: packed does not fit x and the number of columns");
  f.packed = static_cast<const BFloat16*>(packed.const_data_ptr());
  if (bias) {
    check_bfloat16(*bias);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == columns && bias->stride(0) == 1,
                    "packed_linear: bias must be (columns,), dense");
    f.bias = static_cast<const BFloat16*>(bias->const_data_ptr());
  }
  if (add) f.add = rows_like(kName, "add", *add, x, columns);
  Tensor y = uninitialized_rows_like(x, columns);
  f.y = mutable_rows(y);
  if (y.numel() > 0) IMAGEN_FAST_KERNEL_OF(packed_linear_forward, cpu_capability())(f);
  return y;
}

}  // namespace
}  // namespace packed_linear
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("packed_linear_pack", TORCH_BOX(&imagen_fast::packed_linear::pack));
  library.impl("packed_linear", TORCH_BOX(&imagen_fast::packed_linear::forward));
}
