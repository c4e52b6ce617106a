// What the registrations need of torch::stable::Tensor beyond its own methods.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>

#include "number_formats.h"

namespace imagen_fast {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Half: return DType::kHalf;
    case torch::headeronly::ScalarType::BFloat16: return DType::kBFloat16;
    case torch::headeronly::ScalarType::Float: return DType::kFloat;
    case torch::headeronly::ScalarType::Double: return DType::kDouble;
    default: STD_TORCH_CHECK(false, "imagen_fast: the CPU kernels take float16, bfloat16, float32 and float64");
  }
}

// Whether outputs start as 0xff bytes, NaN in every dtype; PyTorch's own such switch does not reach them.
extern std::atomic<bool> poison_outputs;

// An uninitialised CPU tensor; about a microsecond cheaper than torch::stable::empty, which looks up an operator by
// name.
inline Tensor uninitialized(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (poison_outputs.load(std::memory_order_relaxed)) {
    int64_t bytes;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
    if (bytes > 0) std::memset(tensor.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
  }
  return tensor;
}

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// Same dtype, sizes and strides
inline Tensor uninitialized_like(const Tensor& tensor) {
  return uninitialized(tensor.sizes(), tensor.strides(), dtype_code(tensor));
}

// (size,)
inline Tensor uninitialized_vector(int64_t size, int32_t dtype) {
  const int64_t stride = 1;
  return uninitialized({&size, 1}, {&stride, 1}, dtype);
}

// (rows, columns), contiguous
inline Tensor uninitialized_matrix(int64_t rows, int64_t columns, int32_t dtype) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns, 1};
  return uninitialized({sizes, 2}, {strides, 2}, dtype);
}

}  // namespace imagen_fast
