// Registers the CPU kernel of add_noise. The schema, and the checks that tell users what to pass instead, are in
// imagen_fast/ops/add_noise.py; the checks here keep direct calls of the operator from reading out of bounds.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "../common/cpu_capability.h"
#include "../common/sample_views.h"
#include "problem.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void add_noise_kernel(const add_noise::Problem&))

namespace add_noise {
namespace {

constexpr const char* kName = "add_noise";

Tensor run(const Tensor& x0, const Tensor& noise, const Tensor& alphas_cumprod, const Tensor& timesteps) {
  Problem p{};
  p.dtype = dtype_of(x0);
  p.x0 = view_of(kName, "x0", x0);
  p.noise = view_of(kName, "noise", noise);
  bool alike = noise.dim() == x0.dim() && dtype_code(noise) == dtype_code(x0);
  for (int64_t i = 0; alike && i < x0.dim(); ++i) alike = noise.size(i) == x0.size(i);
  STD_TORCH_CHECK(alike, "add_noise: noise must have the shape and dtype of x0");
  p.batch = x0.size(0);
  p.channels = x0.size(1);
  p.positions = count_positions(x0);
  STD_TORCH_CHECK(
      alphas_cumprod.dim() == 1 && alphas_cumprod.is_contiguous() && dtype_of(alphas_cumprod) == DType::kDouble,
      "add_noise: alphas_cumprod must be (n,), contiguous, in float64");
  STD_TORCH_CHECK(timesteps.dim() == 1 && timesteps.size(0) == p.batch && timesteps.is_contiguous() &&
                      dtype_code(timesteps) == aoti_torch_dtype_int64(),
                  "add_noise: timesteps must be (B,), contiguous, in int64");
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
  IMAGEN_FAST_KERNEL(add_noise_kernel)(p);
  return y;
}

}  // namespace
}  // namespace add_noise
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("add_noise_cpu", TORCH_BOX(&imagen_fast::add_noise::run));
}
