// What the registrations of the norms' CUDA kernels share.
#pragma once

#include <initializer_list>
#include <utility>

#include "cuda_norm_tile.cuh"
#include "cuda_tensor.h"
#include "norm_tensors.h"

namespace imagen_fast {

inline void check_cuda_dtype(const char* op, const NormProblem& p) {
  STD_TORCH_CHECK(p.dtype != DType::kDouble, op, ": the CUDA kernels take float16, bfloat16 and float32");
}

inline void check_same_device(const char* op, const Tensor& x,
                              std::initializer_list<std::pair<const char*, std::optional<Tensor>>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    STD_TORCH_CHECK(!tensor || (tensor->is_cuda() == x.is_cuda() && tensor->get_device() == x.get_device()), op, ": ",
                    name, " must be on the device of x");
  }
}

inline Tensor nothing_on(const Tensor& x, int32_t dtype) {
  const int64_t zero = 0;
  const int64_t one = 1;
  return uninitialized_on(x, {&zero, 1}, {&one, 1}, dtype);
}

// An output of the shape and dtype of `parameter`, contiguous, and where the kernel writes it; empty if not `needed`
inline Tensor gradient_on(const Tensor& x, const std::optional<Tensor>& parameter, bool needed, ParameterGradient* to) {
  if (!needed || !parameter) return nothing_on(x, aoti_torch_dtype_float32());
  const int64_t one = 1;
  const int64_t size = parameter->size(0);
  Tensor gradient = parameter->dim() == 1
                        ? uninitialized_on(x, {&size, 1}, {&one, 1}, dtype_code(*parameter))
                        : uninitialized_matrix_on(x, size, parameter->size(1), dtype_code(*parameter));
  *to = {gradient.mutable_data_ptr(), dtype_of(*parameter)};
  return gradient;
}

// Calls launches(TypeTag<T>, vector, channels_last), the last two as integral constants: what tiles are made of.
template <typename Launches>
void dispatch_tiles(const NormProblem& p, int vector, Launches launches) {
  with_type(p.dtype, [&](auto type) {
    constexpr int kWidest = kMaxVector<typename decltype(type)::type>;
    const auto with_layout = [&](auto constant) {
      if (p.channels_last) {
        launches(type, constant, std::true_type());
      } else {
        launches(type, constant, std::false_type());
      }
    };
    if (vector > 1) {
      with_layout(std::integral_constant<int, kWidest>());
    } else {
      with_layout(std::integral_constant<int, 1>());
    }
  });
}

// From S and T, (batch, channels)
inline void launch_parameter_gradients(const NormProblem& p, const float2* sums, const ParameterGradients& gradients,
                                       Stream stream) {
  LaunchConfig config;
  config.grid = static_cast<unsigned>(ceil_div<int64_t>(p.channels, kWarpSize));
  config.block = dim3(kWarpSize, kGradientRows);
  config.stream = stream;
  launch(config, parameter_gradients,
         ParameterSums{sums, p.batch, static_cast<int>(p.channels), p.parameters, gradients});
}

}  // namespace imagen_fast
