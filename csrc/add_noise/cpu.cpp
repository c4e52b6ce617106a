// Registers the CPU kernel of add_noise.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "../common/cpu_capability.h"
#include "arguments.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void add_noise_kernel(const add_noise::Problem&))

namespace add_noise {
namespace {

Tensor run(const Tensor& x0, const Tensor& noise, const Tensor& alphas_cumprod, const Tensor& timesteps) {
  Problem p = problem(x0, noise, alphas_cumprod, timesteps);
  Tensor y = uninitialized_like(x0);
  if (x0.numel() == 0) return y;
  p.y = mutable_view_of(kName, "x0", y);

  std::vector<double> factors(2 * static_cast<size_t>(p.batch));
  const double* alpha = static_cast<const double*>(alphas_cumprod.const_data_ptr());
  const int64_t* timestep = static_cast<const int64_t*>(timesteps.const_data_ptr());
  for (int64_t b = 0; b < p.batch; ++b) {
    const bool known = timestep[b] >= 0 && timestep[b] < alphas_cumprod.size(0);
    const double a = known ? alpha[timestep[b]] : NAN;
    factors[static_cast<size_t>(b)] = std::sqrt(a);
    factors[static_cast<size_t>(p.batch + b)] = std::sqrt(1 - a);
  }
  p.signal = factors.data();
  p.deviation = factors.data() + p.batch;
  if (is_flat(p.x0, p.channels, p.positions) && is_flat(p.noise, p.channels, p.positions) &&
      is_flat(p.y, p.channels, p.positions)) {
    p.positions *= p.channels;
    p.channels = 1;
    p.x0.stride_p = p.noise.stride_p = p.y.stride_p = 1;
  }
  IMAGEN_FAST_KERNEL(add_noise_kernel, p.dtype)(p);
  return y;
}

}  // namespace
}  // namespace add_noise
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("add_noise_cpu", TORCH_BOX(&imagen_fast::add_noise::run));
}
