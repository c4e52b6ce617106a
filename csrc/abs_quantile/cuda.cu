// Launches and registers the CUDA kernels of abs_quantile.
#include <vector>

#include "../common/cuda_tensor.h"
#include "arguments.h"
#include "plan.h"

namespace imagen_fast::abs_quantile {
namespace {

TeamPlan plan(const Tensor& x, const Problem& p) {
  STD_TORCH_CHECK(p.dtype != DType::kDouble, "abs_quantile: the CUDA kernels take float16, bfloat16 and float32");
  return device::make_plan(p.size, p.batch, static_cast<int>(x.element_size()), device_properties());
}

template <typename T>
void launch_quantile(const Problem& p, const TeamPlan& plan, SampleCounts* counts, float* result, LaunchConfig config) {
  if (!plan.resident) {
    const SplitQuantile split{p.x,    p.stride_b, p.size, plan.chunk, plan.blocks, counts, quantile_place(p.q, p.size),
                              result, false};
    launch_clear(counts, p.batch, config);
    launch_passes<T>(split, p.batch, 0, config);
    return;
  }
  config.grid = static_cast<unsigned>(plan.teams * plan.blocks);
  config.block = kSelectThreads;
  config.shared_bytes = plan.shared_bytes;
  config.cluster = plan.team == Team::kCluster ? static_cast<unsigned>(plan.blocks) : 1;
  config.cooperative = plan.team == Team::kGrid;
  launch(config, device::quantile_resident<T>,
         device::Resident{p.x, p.batch, p.stride_b, p.size, plan.team, static_cast<int>(plan.blocks), plan.teams,
                          plan.rounds(p.batch), plan.chunk, counts, quantile_place(p.q, p.size), result});
}

Tensor quantile(const Tensor& x, double q) {
  const Problem p = problem(x, q);
  const OnDeviceOf on(x);
  const int64_t one = 1;
  Tensor result = uninitialized_on(x, {&p.batch, 1}, {&one, 1}, aoti_torch_dtype_float32());
  if (p.batch == 0) return result;
  const TeamPlan chosen = plan(x, p);
  STD_TORCH_CHECK(p.batch * chosen.blocks < int64_t{1} << 31, "abs_quantile: x is too large for one grid");
  std::optional<Tensor> counts;
  if (chosen.team == Team::kGrid) {
    counts = uninitialized_matrix_on(x, p.batch, sizeof(SampleCounts) / 8, aoti_torch_dtype_int64());
  }
  LaunchConfig config;
  config.stream = on.stream();
  with_type(p.dtype, [&](auto type) {
    launch_quantile<typename decltype(type)::type>(
        p, chosen, counts ? static_cast<SampleCounts*>(counts->mutable_data_ptr()) : nullptr,
        static_cast<float*>(result.mutable_data_ptr()), config);
  });
  return result;
}

// For tests: resident (1) or not, team, blocks of a sample, samples at a time
std::vector<int64_t> plan_of(const Tensor& x) {
  const TeamPlan p = plan(x, problem(x, 0));
  return {p.resident, static_cast<int64_t>(p.team), p.blocks, p.teams};
}

}  // namespace
}  // namespace imagen_fast::abs_quantile

IMAGEN_FAST_CUDA_OPERATORS(library) {
  library.impl("abs_quantile_cuda", TORCH_BOX(&imagen_fast::abs_quantile::quantile));
  library.impl("_abs_quantile_cuda_plan", TORCH_BOX(&imagen_fast::abs_quantile::plan_of));
}
