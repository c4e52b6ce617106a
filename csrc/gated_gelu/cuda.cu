// Launches and registers the CUDA kernels of gated_gelu.
#include <tuple>
#include <vector>

#include "../common/cuda_tensor_rows.h"
#include "arguments.h"
#include "kernel.cuh"

namespace imagen_fast::gated_gelu {
namespace {

using device::Plan;

Problem checked_problem(const Tensor& gate, const std::optional<Tensor>& value, bool tanh) {
  const Problem p = problem(gate, value, tanh);
  check_not_double(kOp, p.dtype);
  check_device_of(kOp, gate, "value", value);
  return p;
}

// Of a problem and further tensors
template <typename... Rows>
RowsOfCall rows_of_call(const Problem& p, const Rows&... rows) {
  RowsOfCall call(p.outer, p.inner, p.dtype == DType::kFloat ? 4 : 2);
  call.add(p.gate);
  call.add(p.value);
  (call.add(rows), ...);
  return call;
}

Plan plan_of(const Problem& p, const RowsOfCall& call) {
  return device::make_plan(p.outer * p.inner, p.width, p.dtype == DType::kFloat ? 4 : 2, call.aligned());
}

device::Problem geometry(const Problem& p, const RowsOfCall& call, const Plan& plan) {
  return {call.geometry(), p.width, plan.blocks, p.tanh, p.gate, p.value};
}

// Calls launches(TypeTag<T>, vector, config), the second as an integral constant, for this problem.
template <typename Launches>
void dispatch(const Problem& p, const Plan& plan, Stream stream, Launches launches) {
  const int64_t blocks = plan.row_tiles * plan.blocks;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "gated_gelu: ", blocks, " blocks are too many for one grid");
  LaunchConfig config;
  config.grid = static_cast<unsigned>(blocks);
  config.block = dim3(static_cast<unsigned>(plan.threads), static_cast<unsigned>(plan.rows));
  config.stream = stream;
  with_type(p.dtype, [&](auto type) {
    if (plan.vector > 1) {
      launches(type, std::integral_constant<int, kMaxVector<typename decltype(type)::type>>(), config);
    } else {
      launches(type, std::integral_constant<int, 1>(), config);
    }
  });
}

Tensor forward(const Tensor& gate, const std::optional<Tensor>& value, bool tanh) {
  const Problem p = checked_problem(gate, value, tanh);
  const OnDeviceOf on(gate);
  Tensor y = uninitialized_rows_on(gate, p.width);
  if (y.numel() == 0) return y;
  const MutableRowViews to = mutable_rows(y);
  const RowsOfCall call = rows_of_call(p, to);
  const Plan plan = plan_of(p, call);
  const device::Forward f{geometry(p, call, plan), to};
  dispatch(p, plan, on.stream(), [&](auto type, auto vector, const LaunchConfig& config) {
    launch(config, device::forward<typename decltype(type)::type, decltype(vector)::value>, f);
  });
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& gate, const std::optional<Tensor>& value, bool tanh,
                                    int64_t needs) {
  const Problem p = checked_problem(gate, value, tanh);
  check_device_of(kOp, gate, "dy", dy);
  const RowViews from = rows_like(kOp, "dy", dy, gate, p.width);
  const OnDeviceOf on(gate);
  Tensor dgate =
      needs & 1 ? uninitialized_rows_on(gate, gate.size(2)) : uninitialized_vector_on(gate, 0, dtype_code(gate));
  Tensor dvalue =
      value && needs & 2 ? uninitialized_rows_on(*value, p.width) : uninitialized_vector_on(gate, 0, dtype_code(gate));
  MutableRowViews to_gate, to_value;
  if (needs & 1) to_gate = mutable_rows(dgate);
  if (value && needs & 2) to_value = mutable_rows(dvalue);
  if (!value) to_value = second_half(to_gate, gate);
  if (dy.numel() == 0 || (!to_gate.data && !to_value.data)) return {dgate, dvalue};
  const RowsOfCall call = rows_of_call(p, from, to_gate, to_value);
  const Plan plan = plan_of(p, call);
  const device::Backward f{geometry(p, call, plan), from, to_gate, to_value};
  dispatch(p, plan, on.stream(), [&](auto type, auto vector, const LaunchConfig& config) {
    launch(config, device::backward<typename decltype(type)::type, decltype(vector)::value>, f);
  });
  return {dgate, dvalue};
}

// For tests: elements in an access, threads abreast on a row, blocks of a row, rows of a block, whether all rows lie at
// one distance (1)
std::vector<int64_t> plan_for_tests(const Tensor& gate, const std::optional<Tensor>& value) {
  const Problem p = checked_problem(gate, value, true);
  const RowsOfCall call = rows_of_call(p);
  const Plan plan = plan_of(p, call);
  return {plan.vector, plan.threads, plan.blocks, plan.rows, call.geometry().inner == call.geometry().rows};
}

}  // namespace
}  // namespace imagen_fast::gated_gelu

IMAGEN_FAST_CUDA_OPERATORS(library) {
  library.impl("gated_gelu_cuda", TORCH_BOX(&imagen_fast::gated_gelu::forward));
  library.impl("gated_gelu_backward_cuda", TORCH_BOX(&imagen_fast::gated_gelu::backward));
  library.impl("_gated_gelu_cuda_plan", TORCH_BOX(&imagen_fast::gated_gelu::plan_for_tests));
}
