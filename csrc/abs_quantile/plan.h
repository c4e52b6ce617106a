// How abs_quantile selects: see common/cuda_quantile_plan.h. The values are kept in the dtype of x.
#pragma once

#include "../common/cuda_quantile_plan.h"
#include "kernel.cuh"

namespace imagen_fast::abs_quantile::device {

inline TeamPlan make_plan(int64_t size, int64_t batch, int element_bytes, const DeviceProperties& device) {
  return plan_team(size, batch, element_bytes, 16 / element_bytes, device);
}

}  // namespace imagen_fast::abs_quantile::device
