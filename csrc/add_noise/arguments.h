// What the operators of the CPU and of CUDA make of their arguments. The schema, and the checks that tell users what to
// pass instead, are in imagen_fast/ops/add_noise.py; the checks here keep direct calls of the operators from reading
// out of bounds.
#pragma once

#include "../common/sample_views.h"
#include "problem.h"

namespace imagen_fast::add_noise {

constexpr const char* kName = "add_noise";

// Everything but the result and the factors of the samples
inline Problem problem(const Tensor& x0, const Tensor& noise, const Tensor& alphas_cumprod, const Tensor& timesteps) {
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
  return p;
}

}  // namespace imagen_fast::add_noise
