// Registers the CPU kernel of the 3x3 convolution. Its schema is in imagen_fast/ops/_conv3x3.py; the checks here keep
// direct calls of the operator from reading out of bounds.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../common/cpu_capability.h"
#include "../common/tensor.h"
#include "problem.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void conv3x3(const conv3x3::Problem&))

namespace conv3x3 {
namespace {

bool is_channels_last(const Tensor& x) {
  return x.dim() == 4 && (x.stride(1) == 1 || x.size(1) == 1) && (x.stride(3) == x.size(1) || x.size(3) == 1) &&
         (x.stride(2) == x.size(1) * x.size(3) || x.size(2) == 1) &&
         (x.stride(0) == x.size(1) * x.size(2) * x.size(3) || x.size(0) == 1);
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& add, int64_t out_channels) {
  STD_TORCH_CHECK(is_channels_last(x), "conv3x3: x must be dense in channels-last");
  Problem p{};
  p.dtype = dtype_of(x);
  STD_TORCH_CHECK(p.dtype != DType::kDouble, "conv3x3: x must not be float64");
  p.batch = x.size(0);
  p.in_channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.out_channels = out_channels;
  STD_TORCH_CHECK(
      p.in_channels > 0 && p.in_channels % kChannelStep == 0 && out_channels > 0 && out_channels % kChannelStep == 0,
      "conv3x3: channels must be a multiple of 16");
  const int64_t panels = (out_channels + kPanelColumns - 1) / kPanelColumns;
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_contiguous() && dtype_of(weight) == DType::kFloat &&
                      (weight.size(0) == points_of(2) || weight.size(0) == points_of(4)) && weight.size(1) == panels &&
                      weight.size(2) == p.in_channels && weight.size(3) == kPanelColumns,
                  "conv3x3: weight must be float32 and contiguous, (16 or 36, panels, in_channels, 64)");
  p.edge = weight.size(0) == points_of(2) ? 2 : 4;
  p.weight = static_cast<const float*>(weight.data_ptr());
  p.x = x.data_ptr();
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == out_channels && bias->is_contiguous() && dtype_of(*bias) == p.dtype,
        "conv3x3: bias must be (out_channels,), of x's dtype");
    p.bias = bias->data_ptr();
  }
  if (add) {
    STD_TORCH_CHECK(is_channels_last(*add) && dtype_of(*add) == p.dtype && add->size(0) == p.batch &&
                        add->size(1) == out_channels && add->size(2) == p.height && add->size(3) == p.width,
                    "conv3x3: add must be as the result, of x's dtype, dense in channels-last");
    p.add = add->data_ptr();
  }
  const int64_t sizes[] = {p.batch, out_channels, p.height, p.width};
  const int64_t strides[] = {p.height * p.width * out_channels, 1, p.width * out_channels, out_channels};
  Tensor y = uninitialized({sizes, 4}, {strides, 4}, dtype_code(x));
  p.y = y.mutable_data_ptr();
  if (y.numel() > 0) IMAGEN_FAST_KERNEL_OF(conv3x3, cpu_capability())(p);
  return y;
}

}  // namespace
}  // namespace conv3x3
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("_conv3x3_cpu", TORCH_BOX(&imagen_fast::conv3x3::forward));
}
