// Rows of torch tensors (outer, inner, width) for the launchers of CUDA kernels.
#pragma once

#include "cuda_rows.cuh"
#include "cuda_tensor.h"
#include "tensor_rows.h"

namespace imagen_fast {

inline void check_device_of(const char* op, const Tensor& x, const char* name, const std::optional<Tensor>& tensor) {
  STD_TORCH_CHECK(!tensor || (tensor->is_cuda() == x.is_cuda() && tensor->get_device() == x.get_device()), op, ": ",
                  name, " must be on the device of the others");
}

inline void check_not_double(const char* op, DType dtype) {
  STD_TORCH_CHECK(dtype != DType::kDouble, op, ": the CUDA kernels take float16, bfloat16 and float32");
}

// `uninitialized_rows_like` on the device of x
inline Tensor uninitialized_rows_on(const Tensor& x, int64_t width) {
  const int64_t sizes[] = {x.size(0), x.size(1), width};
  const int64_t outer_first[] = {x.size(1) * width, width, 1};
  const int64_t inner_first[] = {width, x.size(0) * width, 1};
  return uninitialized_on(x, {sizes, 3}, {has_inner_first(x) ? inner_first : outer_first, 3}, dtype_code(x));
}

// (size,) of x's dtype unless another is given
inline Tensor uninitialized_vector_on(const Tensor& x, int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return uninitialized_on(x, {&size, 1}, {&stride, 1}, dtype);
}

// Collects tensors of one call to find out how its rows may be taken.
class RowsOfCall {
 public:
  RowsOfCall(int64_t outer, int64_t inner, int element_bytes)
      : outer_(outer), inner_(inner), element_bytes_(element_bytes) {}

  // Rows without data, which are absent, do not count.
  template <typename Pointer>
  void add(const RowViewsOf<Pointer>& views) {
    if (!views.data) return;
    one_distance_ = one_distance_ && (outer_ == 1 || views.stride_outer == inner_ * views.stride_inner);
    const int64_t unit = 16 / element_bytes_;
    aligned_ = aligned_ && is_aligned(views.data, 16) && (outer_ == 1 || views.stride_outer % unit == 0) &&
               (inner_ == 1 || views.stride_inner % unit == 0);
  }

  // Whether all rows begin at a multiple of 16 bytes
  bool aligned() const { return aligned_; }

  RowGeometry geometry() const { return {outer_ * inner_, one_distance_ ? outer_ * inner_ : inner_}; }

 private:
  int64_t outer_;
  int64_t inner_;
  int element_bytes_;
  bool one_distance_ = true;
  bool aligned_ = true;
};

}  // namespace imagen_fast
