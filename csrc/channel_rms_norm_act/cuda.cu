// Launches and registers the CUDA kernels of channel_rms_norm_act.
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../common/cuda_norm_launch.h"
#include "arguments.h"
#include "plan.h"

namespace imagen_fast::channel_rms_norm_act {
namespace {

using device::make_plan;
using device::Plan;
using device::Sizes;

Sizes sizes(const NormProblem& p, std::initializer_list<const void*> tensors, int read) {
  STD_TORCH_CHECK(p.channels < int64_t{1} << 31, kOp, ": more than 2^31 channels");
  Sizes s;
  s.element_bytes = p.dtype == DType::kFloat ? 4 : 2;
  s.channels_last = p.channels_last;
  s.aligned = true;
  for (const void* tensor : tensors) s.aligned = s.aligned && is_aligned(tensor, 16);
  s.channels = static_cast<int>(p.channels);
  s.positions = p.positions;
  s.tensors = read;
  return s;
}

// What both kernels take of a problem and its plan
device::Positions geometry(const NormProblem& p, const Plan& plan) {
  device::Positions g;
  g.channels = static_cast<int>(p.channels);
  g.positions = p.positions;
  g.groups = g.groups_together = g.slices = 1;
  g.channels_per_group = g.channels;
  g.chunks = plan.chunks;
  g.chunk = plan.chunk;
  g.team = plan.team;
  g.tile_bytes = plan.tile_bytes;
  g.affine_bytes = plan.affine_bytes;
  g.activation = p.activation;
  g.parameters = p.parameters;
  g.lanes = plan.lanes;
  g.scratch_bytes = plan.scratch_bytes;
  return g;
}

LaunchConfig tiles(const NormProblem& p, const Plan& plan, int tensors, Stream stream) {
  STD_TORCH_CHECK(p.batch * plan.chunks < int64_t{1} << 31, kOp, ": ", p.batch * plan.chunks,
                  " tiles are too many for one grid");
  LaunchConfig config;
  config.grid = static_cast<unsigned>(p.batch * plan.blocks);
  config.block = static_cast<unsigned>(plan.threads);
  config.shared_bytes = plan.shared_bytes(tensors);
  config.stream = stream;
  return config;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                   const std::optional<Tensor>& shift, int64_t activation) {
  const NormProblem p = problem(x, weight, scale, shift, activation);
  check_cuda_dtype(kOp, p);
  check_same_device(kOp, x, {{"weight", weight}, {"scale", scale}, {"shift", shift}});
  const OnDeviceOf on(x);
  Tensor y = uninitialized_on(x);
  Tensor rstd = uninitialized_matrix_on(x, p.batch, p.positions, statistics_dtype(p));
  if (x.numel() == 0) return {y, rstd};
  const Plan plan = make_plan(sizes(p, {x.const_data_ptr(), y.const_data_ptr()}, 1), device_properties());
  device::Forward f{};
  static_cast<device::Positions&>(f) = geometry(p, plan);
  f.x = x.const_data_ptr();
  f.y = y.mutable_data_ptr();
  f.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  dispatch_tiles(p, plan.vector, [&](auto type, auto vector, auto layout) {
    using T = typename decltype(type)::type;
    launch(tiles(p, plan, 1, on.stream()), device::forward<T, decltype(vector)::value, decltype(layout)::value>, f);
  });
  return {y, rstd};
}

void launch_backward(const NormProblem& p, const Plan& plan, const device::Backward& f, bool join, Stream stream) {
  dispatch_tiles(p, plan.vector, [&](auto type, auto vector, auto layout) {
    using T = typename decltype(type)::type;
    launch(tiles(p, plan, 2, stream), device::backward<T, decltype(vector)::value, decltype(layout)::value>, f);
  });
  if (!join) return;
  LaunchConfig config;
  config.grid = static_cast<unsigned>(p.batch * ceil_div(f.channels, kWarpSize));
  config.block = dim3(kWarpSize, device::kJoinRows);
  config.stream = stream;
  launch(config, device::backward_join, f);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Of x, weight, scale and shift; `needs` has a bit for each, the lowest for x.
Gradients backward(const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& weight,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t activation,
                   int64_t needs) {
  const NormProblem p = problem(x, weight, scale, shift, activation);
  check_cuda_dtype(kOp, p);
  check_same_device(kOp, x, {{"weight", weight}, {"scale", scale}, {"shift", shift}, {"dy", dy}, {"rstd", rstd}});
  check_gradient(kOp, dy, x);
  check_statistics(kOp, p, "rstd", rstd, p.batch * p.positions);
  const OnDeviceOf on(x);
  Tensor dx = needs & 1 ? uninitialized_on(x) : nothing_on(x, dtype_code(x));
  ParameterGradients gradients;
  Tensor dweight = gradient_on(x, weight, needs & 2, &gradients.weight);
  Tensor dscale = gradient_on(x, scale, needs & 4, &gradients.scale);
  Tensor dshift = gradient_on(x, shift, needs & 8, &gradients.shift);
  if (x.numel() == 0) {
    for (Tensor* sum : {&dweight, &dscale, &dshift}) torch::stable::fill_(*sum, 0);
    return {dx, dweight, dscale, dshift};
  }

  const auto tensors = {dy.const_data_ptr(), x.const_data_ptr(), dx.const_data_ptr()};
  const Plan plan = make_plan(sizes(p, tensors, 2), device_properties());
  device::Backward f{};
  static_cast<device::Positions&>(f) = geometry(p, plan);
  f.dy = dy.const_data_ptr();
  f.x = x.const_data_ptr();
  f.rstd = static_cast<const float*>(rstd.const_data_ptr());
  f.dx = needs & 1 ? dx.mutable_data_ptr() : nullptr;
  f.blocks = plan.blocks;
  f.tiles = plan.tiles;
  f.sums_bytes = plan.sums_bytes;
  // The sums of a sample's only block are its sums.
  const bool join = plan.blocks > 1;
  const int64_t rows = p.batch * (join ? plan.blocks + 1 : 1);
  Tensor workspace = uninitialized_matrix_on(x, rows, 2 * p.channels, aoti_torch_dtype_float32());
  f.sums = static_cast<float2*>(workspace.mutable_data_ptr());
  f.block_sums = join ? f.sums + p.batch * p.channels : f.sums;
  launch_backward(p, plan, f, join && needs >> 1, on.stream());
  if (needs >> 1) launch_parameter_gradients(p, f.sums, gradients, on.stream());
  return {dx, dweight, dscale, dshift};
}

// For tests: resident (1) or not, positions of a tile, elements in an access, threads, team, lanes, blocks of a sample,
// tiles of a block
std::vector<int64_t> plan_of(const Tensor& x, bool backward) {
  const NormProblem p = norm_problem(kOp, x, 0);
  const Plan plan = make_plan(sizes(p, {x.const_data_ptr()}, backward ? 2 : 1), device_properties());
  return {plan.resident, plan.chunk, plan.vector, plan.threads, plan.team, plan.lanes, plan.blocks, plan.tiles};
}

}  // namespace
}  // namespace imagen_fast::channel_rms_norm_act

IMAGEN_FAST_CUDA_OPERATORS(library) {
  library.impl("channel_rms_norm_act_cuda", TORCH_BOX(&imagen_fast::channel_rms_norm_act::forward));
  library.impl("channel_rms_norm_act_backward_cuda", TORCH_BOX(&imagen_fast::channel_rms_norm_act::backward));
  library.impl("_channel_rms_norm_act_cuda_plan", TORCH_BOX(&imagen_fast::channel_rms_norm_act::plan_of));
}
