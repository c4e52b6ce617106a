// x0   = threshold(x0_from_sample x + x0_from_output g + x0_from_noise z)
// next = next_from_sample x + next_from_output g + next_from_x0 x0 + next_from_previous_x0 y + noise_scale v z
// with g the guided output, y the previous x0, z the noise, and v = exp(log-variance / 2) where the variance is
// learned, else 1. What the registration hands to the kernel of the chosen instruction set.
#pragma once

#include "../common/number_formats.h"
#include "../common/views.h"

namespace imagen_fast::sampler_step {

enum class Threshold : int64_t { kNone = 0, kStatic = 1, kDynamic = 2 };

// A row of the solver's table; a term whose coefficient is 0 is left out.
struct Row {
  double x0_from_sample, x0_from_output, x0_from_noise;
  double next_from_sample, next_from_output, next_from_x0, next_from_previous_x0;
  double noise_scale, min_log_variance, max_log_variance;
};

struct Step {
  DType dtype;
  int64_t batch;
  int64_t channels;   // 1 where all channels of a sample are one row in memory
  int64_t positions;  // of a channel
  View sample, output, unconditional, variance, previous_x0, noise;
  const int64_t* seed;  // (batch,), where there is no tensor of noise
  uint32_t row_index;
  Row row;
  double guidance, rescale;
  bool remove_parallel;
  Threshold threshold;
  double percentile, min_value, max_value;
  MutableView next, x0;  // x0 may be absent
};

// The words of `counters` counters, four each, and the normals made of them
struct NoiseTest {
  uint64_t seed;
  uint32_t row, stage;
  uint64_t first_counter;
  int64_t counters;
  uint32_t* words;
  float* normals;
};

}  // namespace imagen_fast::sampler_step
