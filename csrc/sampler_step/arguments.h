// What the operators of the CPU and of CUDA make of their arguments. The schema is explained in
// imagen_fast/ops/_sampler_step_operators.py, and the checks that tell users what to pass instead are in
// imagen_fast/ops/sampler_step.py; the checks here keep direct calls of the operators from reading out of bounds.
#pragma once

#include <optional>

#include "../common/sample_views.h"
#include "problem.h"

namespace imagen_fast::sampler_step {

constexpr const char* kName = "sampler_step";
constexpr int64_t kColumns = 10;

// sample's shape and dtype, but for the number of channels, of which there must be `channels` or more
inline void check_like(const Tensor& sample, const char* name, const Tensor& tensor, int64_t channels) {
  bool alike = tensor.dim() == sample.dim() && tensor.size(1) >= channels;
  for (int64_t i = 0; alike && i < sample.dim(); ++i) alike = i == 1 || tensor.size(i) == sample.size(i);
  STD_TORCH_CHECK(alike, "sampler_step: ", name, " must have the shape of sample");
  STD_TORCH_CHECK(dtype_code(tensor) == dtype_code(sample), "sampler_step: ", name, " must have the dtype of sample");
}

inline View optional_view(const Tensor& sample, const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  check_like(sample, name, *tensor, sample.size(1));
  return view_of(kName, name, *tensor);
}

inline const int64_t* seed_data(int64_t batch, const std::optional<Tensor>& seed) {
  if (!seed) return nullptr;
  STD_TORCH_CHECK(seed->dim() == 1 && seed->size(0) == batch && (batch <= 1 || seed->stride(0) == 1) &&
                      dtype_code(*seed) == aoti_torch_dtype_int64(),
                  "sampler_step: seed must be (B,), contiguous, in int64");
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

inline void check_table(const Tensor& rows, const Tensor& index) {
  STD_TORCH_CHECK(
      rows.dim() == 2 && rows.size(1) >= kColumns && rows.stride(1) == 1 && dtype_of(rows) == DType::kDouble,
      "sampler_step: rows must be (steps, ", kColumns, ") in float64");
  STD_TORCH_CHECK(index.numel() == 1 && dtype_code(index) == aoti_torch_dtype_int64(),
                  "sampler_step: index must be one int64");
}

// The scalars of a call, as the schema has them
struct Options {
  bool learned_variance;
  double guidance, rescale;
  bool remove_parallel;
  int64_t threshold;
  double percentile, min_value, max_value;
};

// Everything but the row and the results
inline Step make_step(const Tensor& sample, const Tensor& output, const std::optional<Tensor>& unconditional_output,
                      const std::optional<Tensor>& previous_x0, const std::optional<Tensor>& noise,
                      const std::optional<Tensor>& seed, const Tensor& rows, const Tensor& index, const Options& o) {
  Step s{};
  s.dtype = dtype_of(sample);
  s.sample = view_of(kName, "sample", sample);
  s.batch = sample.size(0);
  s.channels = sample.size(1);
  s.positions = count_positions(sample);
  check_like(sample, "output", output, o.learned_variance ? 2 * s.channels : s.channels);
  s.output = view_of(kName, "output", output);
  if (o.learned_variance) s.variance = view_of(kName, "output", output, s.channels);
  s.unconditional = optional_view(sample, "unconditional_output", unconditional_output);
  s.previous_x0 = optional_view(sample, "previous_x0", previous_x0);
  s.noise = optional_view(sample, "noise", noise);
  s.seed = seed_data(s.batch, seed);
  check_table(rows, index);
  s.guidance = o.guidance;
  s.rescale = o.rescale;
  s.remove_parallel = o.remove_parallel;
  STD_TORCH_CHECK(o.threshold >= 0 && o.threshold <= 2, "sampler_step: no threshold has the code ", o.threshold);
  STD_TORCH_CHECK(o.threshold != 2 || (o.percentile >= 0 && o.percentile <= 1),
                  "sampler_step: percentile must be in [0, 1]");
  s.threshold = static_cast<Threshold>(o.threshold);
  s.percentile = o.percentile;
  s.min_value = o.min_value;
  s.max_value = o.max_value;
  return s;
}

}  // namespace imagen_fast::sampler_step
