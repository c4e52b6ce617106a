// What the registrations of CUDA kernels need of torch: the dispatch key, the current stream, outputs.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda.cuh"
#include "tensor.h"

// Opens a block that registers CUDA kernels: IMAGEN_FAST_CUDA_OPERATORS(library) { library.impl("name", TORCH_BOX(&f));
// } In the emulator's library they serve tensors of the CPU.
#ifdef IMAGEN_FAST_EMULATED
#define IMAGEN_FAST_CUDA_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library)
#else
#define IMAGEN_FAST_CUDA_OPERATORS(library) STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CUDA, library)

// Weak: PyTorch without CUDA does not define it, and the library loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace imagen_fast {

// Makes the device of `tensor` the current one for a scope, and knows its current stream.
class OnDeviceOf {
 public:
#ifdef IMAGEN_FAST_EMULATED
  explicit OnDeviceOf(const Tensor&) {}
  Stream stream() const { return nullptr; }
#else
  explicit OnDeviceOf(const Tensor& tensor) : device_(tensor.get_device()), guard_(device_) {}
  Stream stream() const {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "imagen_fast: this PyTorch was built without CUDA");
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<Stream>(stream);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// An uninitialised tensor on the device of `like`; in the emulator full of NaN (0xff bytes), so that what a kernel
// leaves unwritten shows.
inline Tensor uninitialized_on(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                               torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, device_type, device_index, &handle));
  Tensor tensor(handle);
#ifdef IMAGEN_FAST_EMULATED
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  if (bytes > 0) std::memset(tensor.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
#endif
  return tensor;
}

// On the same device, with the same dtype, sizes and strides
inline Tensor uninitialized_on(const Tensor& like) {
  return uninitialized_on(like, like.sizes(), like.strides(), dtype_code(like));
}

// Contiguous, of shape (rows, columns)
inline Tensor uninitialized_matrix_on(const Tensor& like, int64_t rows, int64_t columns, int32_t dtype) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns, 1};
  return uninitialized_on(like, {sizes, 2}, {strides, 2}, dtype);
}

}  // namespace imagen_fast
