// Rows (see rows.h) in kernels.
#pragma once

#include "cuda.cuh"
#include "rows.h"

namespace imagen_fast {

// How rows are counted: row r is (r / inner, r % inner).
struct RowGeometry {
  int64_t rows;
  int64_t inner;
};

// Where row r begins, in elements. `inner` is the number of rows wherever all tensors' rows lie at one distance: then
// there is nothing to divide.
__device__ __forceinline__ int64_t row_offset(const RowGeometry& g, int64_t stride_outer, int64_t stride_inner,
                                              int64_t r) {
  if (g.inner == g.rows) return r * stride_inner;
  const int64_t outer = r / g.inner;
  return outer * stride_outer + (r - outer * g.inner) * stride_inner;
}
template <typename T>
__device__ __forceinline__ const T* row_at(const RowGeometry& g, const RowViews& views, int64_t r) {
  return static_cast<const T*>(views.data) + row_offset(g, views.stride_outer, views.stride_inner, r);
}
template <typename T>
__device__ __forceinline__ T* row_at(const RowGeometry& g, const MutableRowViews& views, int64_t r) {
  return static_cast<T*>(views.data) + row_offset(g, views.stride_outer, views.stride_inner, r);
}

}  // namespace imagen_fast
