// Launches and registers the CUDA kernels of group_norm_act.
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../common/cuda_norm_launch.h"
#include "arguments.h"
#include "kernel_backward.cuh"
#include "plan.h"

namespace imagen_fast::group_norm_act {
namespace {

using device::make_plan;
using device::Plan;
using device::Sizes;

Sizes sizes(const Problem& p, std::initializer_list<const void*> tensors, int read) {
  STD_TORCH_CHECK(p.channels < int64_t{1} << 31, "group_norm_act: more than 2^31 channels");
  Sizes s;
  s.element_bytes = p.dtype == DType::kFloat ? 4 : 2;
  s.channels_last = p.channels_last;
  s.aligned = true;
  for (const void* tensor : tensors) s.aligned = s.aligned && is_aligned(tensor, 16);
  s.channels = static_cast<int>(p.channels);
  s.positions = p.positions;
  s.groups = static_cast<int>(p.groups);
  s.tensors = read;
  return s;
}

// What all kernels take of a problem and its plan
TiledNorm geometry(const Problem& p, const Plan& plan) {
  TiledNorm g;
  g.channels = static_cast<int>(p.channels);
  g.positions = p.positions;
  g.groups = static_cast<int>(p.groups);
  g.channels_per_group = g.channels / g.groups;
  g.groups_together = plan.groups_together;
  g.slices = plan.slices;
  g.chunks = plan.chunks;
  g.chunk = plan.chunk;
  g.team = plan.team;
  g.tile_bytes = plan.tile_bytes;
  g.affine_bytes = plan.affine_bytes;
  g.activation = p.activation;
  g.parameters = p.parameters;
  return g;
}

LaunchConfig tiles(const Problem& p, const Plan& plan, Stream stream) {
  const int64_t blocks = p.batch * plan.slices * plan.chunks;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "group_norm_act: ", blocks, " blocks are too many for one grid");
  LaunchConfig config;
  config.grid = static_cast<unsigned>(blocks);
  config.block = static_cast<unsigned>(plan.threads);
  config.cluster = plan.resident ? static_cast<unsigned>(plan.chunks) : 1;
  config.stream = stream;
  return config;
}

void launch_forward(const Problem& p, const Plan& plan, const device::Forward& f, Stream stream) {
  LaunchConfig config = tiles(p, plan, stream);
  dispatch_tiles(p, plan.vector, [&](auto type, auto vector, auto layout) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(vector)::value;
    constexpr bool kNhwc = decltype(layout)::value;
    if (plan.resident) {
      config.shared_bytes = static_cast<size_t>(plan.tile_bytes) + plan.affine_bytes + plan.scratch_bytes;
      launch(config, device::forward_resident<T, V, kNhwc>, f);
    } else {
      config.shared_bytes = static_cast<size_t>(plan.affine_bytes) + plan.scratch_bytes;
      launch(config, device::forward_moments<T, V, kNhwc>, f);
      config.shared_bytes = static_cast<size_t>(plan.affine_bytes);
      launch(config, device::forward_apply<T, V, kNhwc>, f);
    }
  });
}

void launch_backward(const Problem& p, const Plan& plan, const device::Backward& f, Stream stream) {
  LaunchConfig config = tiles(p, plan, stream);
  dispatch_tiles(p, plan.vector, [&](auto type, auto vector, auto layout) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(vector)::value;
    constexpr bool kNhwc = decltype(layout)::value;
    if (plan.resident) {
      config.shared_bytes =
          2 * (static_cast<size_t>(plan.tile_bytes) + plan.sums_bytes) + plan.affine_bytes + plan.scratch_bytes;
      launch(config, device::backward_resident<T, V, kNhwc>, f);
      return;
    }
    config.shared_bytes = static_cast<size_t>(plan.affine_bytes) + plan.scratch_bytes;
    launch(config, device::backward_sums<T, V, kNhwc>, f);
    LaunchConfig join;
    join.grid = static_cast<unsigned>(p.batch * p.groups);
    join.block = 128;
    join.stream = stream;
    launch(join, device::backward_join, f);
    if (f.dx) {
      config.shared_bytes = static_cast<size_t>(plan.affine_bytes);
      launch(config, device::backward_apply<T, V, kNhwc>, f);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                                           const std::optional<Tensor>& shift, int64_t activation, double eps) {
  const Problem p = problem(x, num_groups, weight, bias, scale, shift, activation);
  check_cuda_dtype(kOp, p);
  check_same_device(kOp, x, {{"weight", weight}, {"bias", bias}, {"scale", scale}, {"shift", shift}});
  const OnDeviceOf on(x);
  Tensor y = uninitialized_on(x);
  Tensor mean = uninitialized_matrix_on(x, p.batch, p.groups, statistics_dtype(p));
  Tensor rstd = uninitialized_matrix_on(x, p.batch, p.groups, statistics_dtype(p));
  if (x.numel() == 0) {
    torch::stable::fill_(mean, 0);
    torch::stable::fill_(rstd, 0);
    return {y, mean, rstd};
  }
  const Plan plan = make_plan(sizes(p, {x.const_data_ptr(), y.const_data_ptr()}, 1), device_properties());
  device::Forward f{};
  static_cast<TiledNorm&>(f) = geometry(p, plan);
  f.eps = static_cast<float>(eps);
  f.x = x.const_data_ptr();
  f.y = y.mutable_data_ptr();
  f.mean = static_cast<float*>(mean.mutable_data_ptr());
  f.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  std::optional<Tensor> chunks;
  if (!plan.resident) {
    chunks = uninitialized_matrix_on(x, p.batch * p.groups, 4 * plan.chunks, aoti_torch_dtype_float32());
    f.chunk_moments = static_cast<float4*>(chunks->mutable_data_ptr());
  }
  launch_forward(p, plan, f, on.stream());
  return {y, mean, rstd};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of x, weight, bias, scale and shift; `needs` has a bit for each, the lowest for x.
Gradients backward(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t activation,
                   int64_t needs) {
  const Problem p = problem(x, num_groups, weight, bias, scale, shift, activation);
  check_cuda_dtype(kOp, p);
  check_same_device(kOp, x, {{"weight", weight}, {"bias", bias}, {"scale", scale}, {"shift", shift}});
  check_same_device(kOp, x, {{"dy", dy}, {"mean", mean}, {"rstd", rstd}});
  check_gradient(kOp, dy, x);
  check_statistics(kOp, p, "mean", mean, p.batch * p.groups);
  check_statistics(kOp, p, "rstd", rstd, p.batch * p.groups);
  const OnDeviceOf on(x);
  Tensor dx = needs & 1 ? uninitialized_on(x) : nothing_on(x, dtype_code(x));
  ParameterGradients gradients;
  Tensor dweight = gradient_on(x, weight, needs & 2, &gradients.weight);
  Tensor dbias = gradient_on(x, bias, needs & 4, &gradients.bias);
  Tensor dscale = gradient_on(x, scale, needs & 8, &gradients.scale);
  Tensor dshift = gradient_on(x, shift, needs & 16, &gradients.shift);
  if (x.numel() == 0) {
    for (Tensor* sum : {&dweight, &dbias, &dscale, &dshift}) torch::stable::fill_(*sum, 0);
    return {dx, dweight, dbias, dscale, dshift};
  }

  const auto tensors = {dy.const_data_ptr(), x.const_data_ptr(), dx.const_data_ptr()};
  const Plan plan = make_plan(sizes(p, tensors, 2), device_properties());
  device::Backward f{};
  static_cast<TiledNorm&>(f) = geometry(p, plan);
  f.dy = dy.const_data_ptr();
  f.x = x.const_data_ptr();
  f.mean = static_cast<const float*>(mean.const_data_ptr());
  f.rstd = static_cast<const float*>(rstd.const_data_ptr());
  f.dx = needs & 1 ? dx.mutable_data_ptr() : nullptr;
  f.sums_bytes = plan.sums_bytes;
  // One allocation: S and T, and what the split way needs besides
  const int64_t rows = plan.resident ? p.batch : p.batch * (plan.chunks + 1);
  const int64_t more = plan.resident ? 0 : ceil_div(p.batch * p.groups, p.channels);
  Tensor workspace = uninitialized_matrix_on(x, rows + more, 2 * p.channels, aoti_torch_dtype_float32());
  f.sums = static_cast<float2*>(workspace.mutable_data_ptr());
  f.chunk_sums = f.sums + p.batch * p.channels;
  f.group_sums = f.sums + rows * p.channels;
  launch_backward(p, plan, f, on.stream());
  if (needs >> 1) launch_parameter_gradients(p, f.sums, gradients, on.stream());
  return {dx, dweight, dbias, dscale, dshift};
}

// For tests: resident (1) or not, chunks of a slice, groups of a slice, elements in an access, threads, team
std::vector<int64_t> plan_of(const Tensor& x, int64_t num_groups, bool backward) {
  const Problem p = problem(x, num_groups, {}, {}, {}, {}, 0);
  const Plan plan = make_plan(sizes(p, {x.const_data_ptr()}, backward ? 2 : 1), device_properties());
  return {plan.resident, plan.chunks, plan.groups_together, plan.vector, plan.threads, plan.team};
}

}  // namespace
}  // namespace imagen_fast::group_norm_act

IMAGEN_FAST_CUDA_OPERATORS(library) {
  library.impl("group_norm_act_cuda", TORCH_BOX(&imagen_fast::group_norm_act::forward));
  library.impl("group_norm_act_backward_cuda", TORCH_BOX(&imagen_fast::group_norm_act::backward));
  library.impl("_group_norm_act_cuda_plan", TORCH_BOX(&imagen_fast::group_norm_act::plan_of));
}
