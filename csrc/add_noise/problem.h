// y = sqrt(alpha) x0 + sqrt(1 - alpha) noise, alpha by sample. What the registration hands to the kernel of the chosen
// instruction set.
#pragma once

#include "../common/number_formats.h"
#include "../common/views.h"

namespace imagen_fast::add_noise {

struct Problem {
  DType dtype;
  int64_t batch;
  int64_t channels;   // 1 where all channels of a sample are one row in memory
  int64_t positions;  // of a channel
  View x0, noise;
  MutableView y;
  const double* signal;     // (batch,), sqrt(alpha)
  const double* deviation;  // (batch,), sqrt(1 - alpha)
};

}  // namespace imagen_fast::add_noise
