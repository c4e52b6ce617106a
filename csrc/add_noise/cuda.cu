// Launches and registers the CUDA kernel of add_noise.
#include <vector>

#include "../common/cuda_tensor.h"
#include "arguments.h"
#include "plan.h"

namespace imagen_fast::add_noise {
namespace {

// The kernel's view of x0 and noise, and their order
device::Problem inputs(const Problem& p) {
  STD_TORCH_CHECK(p.dtype != DType::kDouble, "add_noise: the CUDA kernels take float16, bfloat16 and float32");
  device::Problem d{};
  STD_TORCH_CHECK(
      order_of(p.x0, p.channels, p.positions, &d.order) && (p.batch <= 1 || p.x0.stride_b == d.order.size()),
      "add_noise: x0 must be dense");
  d.x0 = p.x0;
  d.noise = p.noise;
  return d;
}

Tensor run(const Tensor& x0, const Tensor& noise, const Tensor& alphas_cumprod, const Tensor& timesteps) {
  const Problem p = problem(x0, noise, alphas_cumprod, timesteps);
  for (const Tensor* tensor : {&noise, &alphas_cumprod, &timesteps}) {
    STD_TORCH_CHECK(on_one_device(*tensor, x0), "add_noise: all tensors must be on the device of x0");
  }
  const OnDeviceOf on(x0);
  Tensor y = uninitialized_on(x0);
  if (x0.numel() == 0) return y;

  device::Problem d = inputs(p);
  d.y = y.mutable_data_ptr();
  d.alphas = static_cast<const double*>(alphas_cumprod.const_data_ptr());
  d.alpha_count = alphas_cumprod.size(0);
  d.timesteps = static_cast<const int64_t*>(timesteps.const_data_ptr());
  const device::Plan plan = device::make_plan(d.order, d.x0, d.noise, d.y, p.batch, x0.element_size());
  d.chunk = plan.chunk;
  d.chunks = plan.chunks;
  STD_TORCH_CHECK(p.batch * plan.chunks < int64_t{1} << 31, "add_noise: x0 is too large for one grid");
  LaunchConfig config;
  config.grid = static_cast<unsigned>(p.batch * plan.chunks);
  config.block = device::kThreads;
  config.stream = on.stream();
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(config, plan.vector > 1 ? device::add_noise<T, kMaxVector<T>> : device::add_noise<T, 1>, d);
  });
  return y;
}

// For tests: elements in an access, chunks of a sample
std::vector<int64_t> plan_of(const Tensor& x0, const Tensor& noise) {
  Problem p{};
  p.dtype = dtype_of(x0);
  p.x0 = view_of(kName, "x0", x0);
  p.noise = view_of(kName, "noise", noise);
  p.batch = x0.size(0), p.channels = x0.size(1), p.positions = count_positions(x0);
  const device::Problem d = inputs(p);
  const device::Plan plan = device::make_plan(d.order, d.x0, d.noise, nullptr, p.batch, x0.element_size());
  return {plan.vector, plan.chunks};
}

}  // namespace
}  // namespace imagen_fast::add_noise

IMAGEN_FAST_CUDA_OPERATORS(library) {
  library.impl("add_noise_cuda", TORCH_BOX(&imagen_fast::add_noise::run));
  library.impl("_add_noise_cuda_plan", TORCH_BOX(&imagen_fast::add_noise::plan_of));
}
