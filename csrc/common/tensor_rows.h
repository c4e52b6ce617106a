// Rows of torch tensors (outer, inner, width).
#pragma once

#include "rows.h"
#include "tensor.h"

namespace imagen_fast {

inline RowViews rows_of(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) == 1 || x.numel() == 0), op, ": ", name,
                  " must be (outer, inner, width) with dense rows");
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

// Of the dtype and the first two sizes of x, with rows of `width`
inline RowViews rows_like(const char* op, const char* name, const Tensor& y, const Tensor& x, int64_t width) {
  const RowViews rows = rows_of(op, name, y);
  STD_TORCH_CHECK(y.size(0) == x.size(0) && y.size(1) == x.size(1) && y.size(2) == width && dtype_of(y) == dtype_of(x),
                  op, ": ", name, " does not fit the dtype or the shape of the others");
  return rows;
}

inline MutableRowViews mutable_rows(const Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1)}; }

// Whether x is in memory as (inner, outer, width). Rows that are expanded, with a stride of 0, are not. (Likewise
// `imagen_fast.layout.has_inner_first`.)
inline bool has_inner_first(const Tensor& x) { return 0 < x.stride(0) && x.stride(0) < x.stride(1); }

// Of x's dtype, its first two sizes and their order in memory; dense. (`imagen_fast.layout.empty_rows_like`)
inline Tensor uninitialized_rows_like(const Tensor& x, int64_t width) {
  const int64_t sizes[] = {x.size(0), x.size(1), width};
  const int64_t outer_first[] = {x.size(1) * width, width, 1};
  const int64_t inner_first[] = {width, x.size(0) * width, 1};
  return uninitialized({sizes, 3}, {has_inner_first(x) ? inner_first : outer_first, 3}, dtype_code(x));
}

}  // namespace imagen_fast
