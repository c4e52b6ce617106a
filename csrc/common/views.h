// Tensors (B, C, positions...) as the element-wise kernels of the sampler see them: positions are one dimension.
#pragma once

#include <cstdint>

namespace imagen_fast {

// Element (b, c, p) is at b * stride_b + c * stride_c + p * stride_p; absent if data is null.
struct View {
  const void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_c = 0;
  int64_t stride_p = 1;
};

struct MutableView {
  void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_c = 0;
  int64_t stride_p = 1;
};

}  // namespace imagen_fast

#if defined(IMAGEN_FAST_ISA) && !defined(IMAGEN_FAST_EMULATED)
#include "vec.h"

namespace imagen_fast::IMAGEN_FAST_ISA {

// Elements p, ..., p + n - 1 of a channel, in S: in place where they are that already, otherwise in `scratch`.
template <typename T, typename S>
inline const S* read_row(const View& view, int64_t b, int64_t c, int64_t p, int64_t n, S* scratch) {
  const T* from = static_cast<const T*>(view.data) + b * view.stride_b + c * view.stride_c + p * view.stride_p;
  if (view.stride_p != 1) {
    for (int64_t i = 0; i < n; ++i) scratch[i] = widen(from[i * view.stride_p]);
    return scratch;
  }
  if constexpr (std::is_same_v<T, S>) {
    return from;
  } else {
    for_each_vector<S>(n, [&](int64_t i, auto lanes) { store(load(from + i, lanes), scratch + i, lanes); });
    return scratch;
  }
}

// Where a row may be written directly, or null
template <typename T, typename S>
inline S* row_in_place(const MutableView& view, int64_t b, int64_t c, int64_t p) {
  if constexpr (std::is_same_v<T, S>) {
    if (view.stride_p == 1) return static_cast<T*>(view.data) + b * view.stride_b + c * view.stride_c + p;
  }
  return nullptr;
}

template <typename T, typename S>
inline void write_row(const S* row, const MutableView& view, int64_t b, int64_t c, int64_t p, int64_t n) {
  T* to = static_cast<T*>(view.data) + b * view.stride_b + c * view.stride_c + p * view.stride_p;
  if (view.stride_p != 1) {
    for (int64_t i = 0; i < n; ++i) narrow(row[i], to + i * view.stride_p);
  } else {
    for_each_vector<S>(n, [&](int64_t i, auto lanes) { store(load(row + i, lanes), to + i, lanes); });
  }
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
#endif
