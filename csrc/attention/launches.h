// Launches of attention's CUDA kernels, each in a file of its own, which are compiled side by side.
#pragma once

#include <stdexcept>

#include "plan.h"

namespace imagen_fast::attention {

void launch_forward(DType dtype, const device::Forward& f, int64_t batch, Stream stream);
void launch_statistics(DType dtype, const device::Backward& f, int64_t batch, Stream stream);
void launch_backward_queries(DType dtype, const device::QueryGradients& f, int64_t batch, Stream stream);
void launch_backward_keys(DType dtype, const device::KeyGradients& f, int64_t batch, Stream stream);
void launch_backward_bias(DType dtype, const device::BiasGradients& f, Stream stream);

inline LaunchConfig launch_config(int64_t blocks, int warps, int64_t shared_bytes, Stream stream) {
  if (blocks >= int64_t{1} << 31) throw std::runtime_error("attention: too many blocks for one grid");
  LaunchConfig config;
  config.grid = static_cast<unsigned>(blocks);
  config.block = static_cast<unsigned>(warps * kWarpSize);
  config.shared_bytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return config;
}

}  // namespace imagen_fast::attention
