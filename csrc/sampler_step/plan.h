// How sampler_step is run: accesses of 16 bytes or of single elements; and, with a dynamic threshold, who selects the
// quantile and what is kept meanwhile (see common/cuda_quantile_plan.h).
#pragma once

#include "../common/cuda_quantile_plan.h"
#include "kernel_guidance.cuh"
#include "kernel_quantile.cuh"

namespace imagen_fast::sampler_step::device {

constexpr int64_t kUnit = 8;           // elements of a chunk are a multiple of it
constexpr int64_t kLarge = 256 << 10;  // elements of a sample; above, a thread takes several vectors

struct Plan {
  int vector;         // elements in one access
  bool selects;       // there is a dynamic threshold
  TeamPlan team;      // for it
  bool keeps_update;  // beside x0
  Chunks elements;    // of step_elements
  Chunks sums;        // of guidance_sums
};

inline bool takes_vectors(const Problem& p, int element_bytes) {
  for (const View* view : {&p.sample, &p.output, &p.unconditional, &p.variance, &p.previous_x0, &p.noise}) {
    if (!reads_vectors(p.order, *view, p.batch, element_bytes)) return false;
  }
  const bool samples_aligned = p.batch == 1 || p.order.size() * element_bytes % 16 == 0;
  // Four elements share a counter of the noise, if they are neighbours in it.
  const bool neighbours = !p.seed || !p.order.channels_last;
  return samples_aligned && neighbours && is_aligned(p.next, 16) && is_aligned(p.x0, 16);
}

inline Plan make_plan(const Problem& p, int element_bytes, const DeviceProperties& device) {
  Plan plan{};
  const int64_t size = p.order.size();
  plan.vector = takes_vectors(p, element_bytes) ? 16 / element_bytes : 1;
  plan.elements.chunk = kThreads * plan.vector * (size > kLarge ? 4 : 1);
  plan.elements.chunks = ceil_div(size, plan.elements.chunk);
  plan.sums = {ceil_div(size, kSumChunk), kSumChunk};
  plan.selects = p.threshold == Threshold::kDynamic;
  if (!plan.selects) return plan;
  for (const int floats : {2, 1}) {
    plan.team = plan_team(size, p.batch, floats * static_cast<int>(sizeof(float)), kUnit, device);
    plan.keeps_update = floats == 2;
    if (plan.team.resident) break;
  }
  return plan;
}

}  // namespace imagen_fast::sampler_step::device
