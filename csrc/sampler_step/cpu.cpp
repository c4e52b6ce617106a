// Registers the CPU kernel of sampler_step.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "../common/cpu_capability.h"
#include "arguments.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void sampler_step_kernel(const sampler_step::Step&))
IMAGEN_FAST_DECLARE_KERNEL(void sampler_step_noise(const sampler_step::NoiseTest&))

namespace sampler_step {
namespace {

// The table's row that index names, or no value if there is no such row
std::optional<Row> read_row_of(const Tensor& rows, int64_t index) {
  if (index < 0 || index >= rows.size(0)) return std::nullopt;
  const double* v = static_cast<const double*>(rows.const_data_ptr()) + index * rows.stride(0);
  return Row{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9]};
}

// Where every tensor has all channels of a sample in one row, they are treated as one channel.
void flatten_channels(Step& s) {
  for (const View& view : {s.sample, s.output, s.unconditional, s.variance, s.previous_x0, s.noise}) {
    if (!is_flat(view, s.channels, s.positions)) return;
  }
  if (!is_flat(s.next, s.channels, s.positions) || !is_flat(s.x0, s.channels, s.positions)) return;
  s.positions *= s.channels;
  s.channels = 1;
  for (View* view : {&s.sample, &s.output, &s.unconditional, &s.variance, &s.previous_x0, &s.noise}) view->stride_p = 1;
  s.next.stride_p = s.x0.stride_p = 1;
}

std::tuple<Tensor, Tensor> step(const Tensor& sample, const Tensor& output,
                                const std::optional<Tensor>& unconditional_output,
                                const std::optional<Tensor>& previous_x0, const std::optional<Tensor>& noise,
                                const std::optional<Tensor>& seed, const Tensor& rows, const Tensor& index,
                                bool learned_variance, double guidance, double rescale, bool remove_parallel,
                                int64_t threshold, double percentile, double min_value, double max_value,
                                bool write_x0) {
  const Options options{learned_variance, guidance,   rescale,   remove_parallel,
                        threshold,        percentile, min_value, max_value};
  Step s = make_step(sample, output, unconditional_output, previous_x0, noise, seed, rows, index, options);
  Tensor next = uninitialized_like(sample);
  const int64_t nothing[] = {0}, one[] = {1};
  Tensor x0 = write_x0 ? uninitialized_like(sample) : uninitialized({nothing, 1}, {one, 1}, dtype_code(sample));
  s.next = mutable_view_of(kName, "sample", next);
  if (write_x0) s.x0 = mutable_view_of(kName, "sample", x0);

  const int64_t row_index = *static_cast<const int64_t*>(index.const_data_ptr());
  const auto row = read_row_of(rows, row_index);
  if (sample.numel() == 0) return {next, x0};
  if (!row) {
    torch::stable::fill_(next, NAN);
    if (write_x0) torch::stable::fill_(x0, NAN);
    return {next, x0};
  }
  s.row = *row;
  s.row_index = static_cast<uint32_t>(row_index);
  STD_TORCH_CHECK(s.noise.data || s.seed || (s.row.noise_scale == 0 && s.row.x0_from_noise == 0),
                  "sampler_step: this row needs noise or a seed");
  STD_TORCH_CHECK(s.previous_x0.data || s.row.next_from_previous_x0 == 0, "sampler_step: this row needs previous_x0");
  flatten_channels(s);
  IMAGEN_FAST_KERNEL(sampler_step_kernel, s.dtype)(s);
  return {next, x0};
}

// For tests: the words and normals of a stream's counters
std::tuple<Tensor, Tensor> noise(int64_t seed, int64_t row, int64_t stage, int64_t first_counter, int64_t counters) {
  STD_TORCH_CHECK(counters >= 0, "sampler_step: no negative number of counters");
  Tensor words = uninitialized_matrix(counters, 4, aoti_torch_dtype_int32());
  Tensor normals = uninitialized_matrix(counters, 4, aoti_torch_dtype_float32());
  NoiseTest test{static_cast<uint64_t>(seed),
                 static_cast<uint32_t>(row),
                 static_cast<uint32_t>(stage),
                 static_cast<uint64_t>(first_counter),
                 counters,
                 static_cast<uint32_t*>(words.mutable_data_ptr()),
                 static_cast<float*>(normals.mutable_data_ptr())};
  IMAGEN_FAST_KERNEL_OF(sampler_step_noise, cpu_capability())(test);
  return {words, normals};
}

}  // namespace
}  // namespace sampler_step
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("sampler_step_cpu", TORCH_BOX(&imagen_fast::sampler_step::step));
}

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CompositeExplicitAutograd, library) {
  library.impl("_philox_cpu", TORCH_BOX(&imagen_fast::sampler_step::noise));
}
