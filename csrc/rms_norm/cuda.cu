// Launches and registers the CUDA kernels of rms_norm.
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../common/cuda_tensor_rows.h"
#include "arguments.h"
#include "kernel_backward.cuh"
#include "kernel_forward.cuh"

namespace imagen_fast::rms_norm {
namespace {

using device::Plan;

Problem checked_problem(const Tensor& x, const Tensor& weight) {
  const Problem p = problem(x, weight);
  check_not_double(kOp, p.dtype);
  check_device_of(kOp, x, "weight", weight);
  STD_TORCH_CHECK(p.width < int64_t{1} << 31, "rms_norm: rows of more than 2^31 elements");
  return p;
}

int element_bytes(const Problem& p) { return p.dtype == DType::kFloat ? 4 : 2; }

template <typename... Rows>
RowsOfCall rows_of_call(const Problem& p, const Rows&... rows) {
  RowsOfCall call(p.outer, p.inner, element_bytes(p));
  (call.add(rows), ...);
  return call;
}

Plan plan_of(const Problem& p, const RowsOfCall& call, bool backward) {
  const bool weight_aligned = is_aligned(p.weight.data, 16) && p.weight.stride_c == 1;
  return device::make_plan({p.outer * p.inner, p.width, element_bytes(p), call.aligned() && weight_aligned, backward},
                           device_properties());
}

device::Problem geometry(const Problem& p, const RowsOfCall& call) {
  return {call.geometry(), static_cast<int>(p.width), p.weight};
}

LaunchConfig blocks_of(int64_t blocks, int threads, int abreast, Stream stream) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "rms_norm: ", blocks, " blocks are too many for one grid");
  LaunchConfig config;
  config.grid = static_cast<unsigned>(blocks);
  config.block = dim3(static_cast<unsigned>(threads), static_cast<unsigned>(abreast));
  config.stream = stream;
  return config;
}

// Calls launches(TypeTag<T>, vector), the second as an integral constant, for this problem.
template <typename Launches>
void dispatch(const Problem& p, const Plan& plan, Launches launches) {
  with_type(p.dtype, [&](auto type) {
    if (plan.vector > 1) {
      launches(type, std::integral_constant<int, kMaxVector<typename decltype(type)::type>>());
    } else {
      launches(type, std::integral_constant<int, 1>());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual,
                                           double eps) {
  const Problem p = checked_problem(x, weight);
  check_device_of(kOp, x, "residual", residual);
  RowViews added;
  if (residual) added = rows_like(kOp, "residual", *residual, x, p.width);
  const OnDeviceOf on(x);
  Tensor y = uninitialized_rows_on(x, p.width);
  Tensor sum = residual ? uninitialized_rows_on(x, p.width) : uninitialized_vector_on(x, 0, dtype_code(x));
  Tensor rstd = uninitialized_matrix_on(x, p.outer, p.inner, statistics_dtype(p));
  if (y.numel() == 0) return {y, sum, rstd};
  device::Forward f{};
  f.eps = static_cast<float>(eps);
  f.x = rows_of(kOp, "x", x);
  f.residual = added;
  if (residual) f.sum = mutable_rows(sum);
  f.y = mutable_rows(y);
  f.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  const RowsOfCall call = rows_of_call(p, f.x, f.residual, f.sum, f.y);
  static_cast<device::Problem&>(f) = geometry(p, call);
  const Plan plan = plan_of(p, call, false);
  const LaunchConfig config = blocks_of(plan.blocks, plan.threads, plan.abreast, on.stream());
  dispatch(p, plan, [&](auto type, auto vector) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(vector)::value;
    launch(config, plan.resident ? device::forward_resident<T, V> : device::forward_walk<T, V>, f);
  });
  return {y, sum, rstd};
}

void launch_backward(const Problem& p, const Plan& plan, const device::Backward& f, Stream stream) {
  dispatch(p, plan, [&](auto type, auto vector) {
    using T = typename decltype(type)::type;
    constexpr int V = decltype(vector)::value;
    if (plan.resident) {
      LaunchConfig config = blocks_of(plan.row_blocks, plan.threads, plan.abreast, stream);
      config.shared_bytes = f.partial && plan.abreast > 1 ? f.width * sizeof(float) : 0;
      launch(config, device::backward_resident<T, V>, f);
      return;
    }
    if (f.dx.data) launch(blocks_of(plan.blocks, plan.threads, 1, stream), device::backward_walk<T, V>, f);
    if (f.partial) {
      const int64_t columns = ceil_div<int64_t>(p.width / V, device::kColumnThreads);
      launch(blocks_of(plan.row_blocks * columns, device::kColumnThreads, 1, stream), device::weight_walk<T, V>, f);
    }
  });
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x,
                                    const Tensor& rstd, const Tensor& weight, int64_t needs) {
  const Problem p = checked_problem(x, weight);
  check_device_of(kOp, x, "dy", dy);
  check_device_of(kOp, x, "dsum", dsum);
  check_device_of(kOp, x, "rstd", rstd);
  check_rstd(p, rstd);
  device::Backward f{};
  f.dy = rows_like(kOp, "dy", dy, x, p.width);
  if (dsum) f.dsum = rows_like(kOp, "dsum", *dsum, x, p.width);
  f.s = rows_of(kOp, "x", x);
  f.rstd = static_cast<const float*>(rstd.const_data_ptr());
  const OnDeviceOf on(x);
  Tensor dx = needs & 1 ? uninitialized_rows_on(x, p.width) : uninitialized_vector_on(x, 0, dtype_code(x));
  Tensor dweight = uninitialized_vector_on(x, needs & 2 ? p.width : 0, dtype_code(weight));
  if (x.numel() == 0) {
    torch::stable::fill_(dweight, 0);
    return {dx, dweight};
  }
  if (!(needs & 3)) return {dx, dweight};
  if (needs & 1) f.dx = mutable_rows(dx);
  const RowsOfCall call = rows_of_call(p, f.dy, f.dsum, f.s, f.dx);
  static_cast<device::Problem&>(f) = geometry(p, call);
  const Plan plan = plan_of(p, call, true);
  f.row_blocks = plan.row_blocks;
  f.rows_of_block = plan.rows_of_block;
  std::optional<Tensor> partial;
  if (needs & 2) {
    partial = uninitialized_matrix_on(x, plan.row_blocks, p.width, aoti_torch_dtype_float32());
    f.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  launch_backward(p, plan, f, on.stream());
  if (needs & 2) {
    const int64_t columns = ceil_div<int64_t>(p.width, kWarpSize);
    launch(blocks_of(columns, kWarpSize, device::kJoinRows, on.stream()), device::join, f.partial, plan.row_blocks,
           f.width, ParameterGradient{dweight.mutable_data_ptr(), p.weight.dtype});
  }
  return {dx, dweight};
}

// For tests: resident (1) or not, forward and backward, elements in an access, threads of a row, rows of a block at a
// time; backward: parts of the weight's gradient, rows of each
std::vector<int64_t> plan_for_tests(const Tensor& x, const Tensor& weight) {
  const Problem p = checked_problem(x, weight);
  const RowsOfCall call = rows_of_call(p, rows_of(kOp, "x", x));
  const Plan forward = plan_of(p, call, false);
  const Plan backward = plan_of(p, call, true);
  return {forward.resident, backward.resident,   forward.vector,        forward.threads,
          forward.abreast,  backward.row_blocks, backward.rows_of_block};
}

}  // namespace
}  // namespace imagen_fast::rms_norm

IMAGEN_FAST_CUDA_OPERATORS(library) {
  library.impl("rms_norm_cuda", TORCH_BOX(&imagen_fast::rms_norm::forward));
  library.impl("rms_norm_backward_cuda", TORCH_BOX(&imagen_fast::rms_norm::backward));
  library.impl("_rms_norm_cuda_plan", TORCH_BOX(&imagen_fast::rms_norm::plan_for_tests));
}
