// Tensors as the ops on the last dimension see them: rows (outer, inner), each dense. No torch header may be included
// here (see number_formats.h).
#pragma once

#include <cstdint>

namespace imagen_fast {

// Row (o, i) begins at o * stride_outer + i * stride_inner; absent if data is null.
template <typename Pointer>
struct RowViewsOf {
  Pointer data = nullptr;
  int64_t stride_outer = 0;
  int64_t stride_inner = 0;
};
using RowViews = RowViewsOf<const void*>;
using MutableRowViews = RowViewsOf<void*>;

}  // namespace imagen_fast

#ifdef IMAGEN_FAST_ISA
namespace imagen_fast::IMAGEN_FAST_ISA {

// Row r of outer * inner, as elements of T
template <typename T>
inline const T* row(const RowViews& rows, int64_t r, int64_t inner) {
  return static_cast<const T*>(rows.data) + r / inner * rows.stride_outer + r % inner * rows.stride_inner;
}
template <typename T>
inline T* row(const MutableRowViews& rows, int64_t r, int64_t inner) {
  return static_cast<T*>(rows.data) + r / inner * rows.stride_outer + r % inner * rows.stride_inner;
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
#endif
