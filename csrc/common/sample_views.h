// Views of torch tensors for the element-wise kernels of the sampler.
#pragma once

#include "tensor.h"
#include "views.h"

namespace imagen_fast {

// The stride of the positions (all dimensions from the third on) of x, or -1 if they do not have a single one. Any
// strides serve where there are no elements.
inline int64_t position_stride(const Tensor& x) {
  if (x.numel() == 0) return 1;
  int64_t stride = 0;
  int64_t expected = 0;
  for (int64_t i = x.dim() - 1; i >= 2; --i) {
    if (x.size(i) == 1) continue;
    if (x.stride(i) == 0) return -1;
    if (stride == 0) {
      stride = expected = x.stride(i);
    } else if (x.stride(i) != expected) {
      return -1;
    }
    expected *= x.size(i);
  }
  return stride == 0 ? 1 : stride;
}

inline int64_t count_positions(const Tensor& x) {
  int64_t positions = 1;
  for (int64_t i = 2; i < x.dim(); ++i) positions *= x.size(i);
  return positions;
}

// x (B, C, ...) from channel `first_channel` on; `caller` and `name` are for the error.
inline View view_of(const char* caller, const char* name, const Tensor& x, int64_t first_channel = 0) {
  STD_TORCH_CHECK(x.dim() >= 2, caller, ": ", name, " must have at least 2 dimensions, got ", x.dim());
  const int64_t stride_p = position_stride(x);
  STD_TORCH_CHECK(stride_p >= 0, caller, ": the positions of ", name, " must lie at one distance from each other");
  const int64_t stride_c = x.stride(1);
  const int64_t offset = first_channel * stride_c * static_cast<int64_t>(x.element_size());
  return {static_cast<const char*>(x.const_data_ptr()) + offset, x.stride(0), stride_c, stride_p};
}

inline MutableView mutable_view_of(const char* caller, const char* name, Tensor& x) {
  const View view = view_of(caller, name, x);
  return {x.mutable_data_ptr(), view.stride_b, view.stride_c, view.stride_p};
}

inline bool on_one_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device() == b.get_device();
}

// Whether all channels of a sample are one row
template <typename AnyView>
inline bool is_flat(const AnyView& view, int64_t channels, int64_t positions) {
  return !view.data || ((view.stride_p == 1 || positions == 1) && (view.stride_c == positions || channels == 1));
}

}  // namespace imagen_fast
