// Launches and registers the CUDA kernels of sampler_step.
#include <tuple>
#include <vector>

#include "../common/cuda_tensor.h"
#include "arguments.h"
#include "plan.h"

namespace imagen_fast::sampler_step {
namespace {

using device::Plan;

// One allocation, in parts at multiples of 256 bytes
class Workspace {
 public:
  template <typename T>
  void reserve(T** part, int64_t count) {
    parts_.push_back({reinterpret_cast<void**>(part), bytes_});
    bytes_ += ceil_div<int64_t>(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
  }

  // Sets what `part` of each `reserve` points to.
  void allocate(const Tensor& like) {
    if (bytes_ == 0) return;
    memory_ = uninitialized_matrix_on(like, 1, bytes_ / 8, aoti_torch_dtype_int64());
    for (const Part& part : parts_) *part.pointer = static_cast<char*>(memory_->mutable_data_ptr()) + part.offset;
  }

 private:
  struct Part {
    void** pointer;
    int64_t offset;
  };
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
};

// Everything but the results
device::Problem inputs(const Step& s, const Tensor& rows, const Tensor& index) {
  STD_TORCH_CHECK(s.dtype != DType::kDouble, "sampler_step: the CUDA kernels take float16, bfloat16 and float32");
  device::Problem p{};
  STD_TORCH_CHECK(
      order_of(s.sample, s.channels, s.positions, &p.order) && (s.batch <= 1 || s.sample.stride_b == p.order.size()),
      "sampler_step: sample must be dense");
  p.batch = s.batch;
  p.sample = s.sample;
  p.output = s.output;
  p.unconditional = s.unconditional;
  p.variance = s.variance;
  p.previous_x0 = s.previous_x0;
  p.noise = s.noise;
  p.seed = s.noise.data ? nullptr : s.seed;
  p.rows = static_cast<const double*>(rows.const_data_ptr());
  p.row_stride = rows.stride(0);
  p.row_count = rows.size(0);
  p.index = static_cast<const int64_t*>(index.const_data_ptr());
  p.guidance = static_cast<float>(s.guidance);
  p.threshold = s.threshold;
  p.min_value = static_cast<float>(s.min_value);
  p.max_value = static_cast<float>(s.max_value);
  return p;
}

void check_devices(const Tensor& sample, std::initializer_list<const std::optional<Tensor>*> tensors) {
  for (const auto* tensor : tensors) {
    STD_TORCH_CHECK(!*tensor || on_one_device(**tensor, sample),
                    "sampler_step: all tensors must be on the device of sample");
  }
}

LaunchConfig chunks_of(const device::Problem& p, const device::Chunks& chunks, int threads, Stream stream) {
  STD_TORCH_CHECK(p.batch * chunks.chunks < int64_t{1} << 31, "sampler_step: sample is too large for one grid");
  LaunchConfig config;
  config.grid = static_cast<unsigned>(p.batch * chunks.chunks);
  config.block = static_cast<unsigned>(threads);
  config.stream = stream;
  return config;
}

template <typename T>
void launch_guidance(const Step& s, const device::Problem& p, const Plan& plan, device::Sums* parts, float2* factors,
                     Stream stream) {
  LaunchConfig config = chunks_of(p, plan.sums, device::kThreads, stream);
  launch(config, device::guidance_sums<T>, p, plan.sums, parts);
  config.grid = static_cast<unsigned>(p.batch);
  config.block = kWarpSize;
  launch(config, device::guidance_factors<T>, p, parts, plan.sums.chunks, s.rescale, s.remove_parallel, s.guidance,
         factors);
}

template <typename T, int V>
void launch_resident(const device::Problem& p, const Plan& plan, const device::Residence& residence, Stream stream) {
  const TeamPlan& team = plan.team;
  LaunchConfig config = chunks_of(p, {team.blocks, 0}, kSelectThreads, stream);
  config.grid = static_cast<unsigned>(team.teams * team.blocks);
  config.shared_bytes = team.shared_bytes;
  config.cluster = team.team == Team::kCluster ? static_cast<unsigned>(team.blocks) : 1;
  config.cooperative = team.team == Team::kGrid;
  launch(config, device::step_resident<T, V>, p, residence);
}

// x0 is kept in global memory, and each pass of the selection is a launch.
template <typename T, int V>
void launch_split(const device::Problem& p, const Plan& plan, const SplitQuantile& split, float* x0, Stream stream) {
  const device::Chunks chunks{split.chunks, split.chunk};
  const LaunchConfig config = chunks_of(p, chunks, kSelectThreads, stream);
  launch_clear(split.counts, p.batch, config);
  launch(config, device::step_x0<T, V>, p, chunks, split, x0);
  launch_passes<float>(split, p.batch, 1, config);
  launch(chunks_of(p, plan.elements, device::kThreads, stream), device::step_elements<T, V>, p, plan.elements, x0,
         split.result);
}

template <typename T, int V>
void launch_step(const Step& s, device::Problem p, const Plan& plan, const Tensor& like, Stream stream) {
  const int64_t size = p.order.size();
  const bool sums = p.unconditional.data && (s.remove_parallel || s.rescale != 0);
  const bool split = plan.selects && !plan.team.resident;
  Workspace workspace;
  device::Sums* parts;
  float2* factors;
  SampleCounts* counts = nullptr;
  float* quantiles;
  float* x0 = std::is_same_v<T, float> ? static_cast<float*>(p.next) : nullptr;  // where next will be
  if (sums) {
    workspace.reserve(&parts, p.batch * plan.sums.chunks);
    workspace.reserve(&factors, p.batch);
  }
  if (plan.selects && plan.team.team == Team::kGrid) workspace.reserve(&counts, p.batch);
  if (split) workspace.reserve(&quantiles, p.batch);
  if (split && !x0) workspace.reserve(&x0, p.batch * size);
  workspace.allocate(like);

  if (sums) {
    launch_guidance<T>(s, p, plan, parts, factors, stream);
    p.guided = factors;
  }
  const bool only_nan = s.max_value <= s.min_value;
  const QuantilePlace place = quantile_place(s.percentile, size);
  if (split) {
    launch_split<T, V>(
        p, plan, SplitQuantile{x0, size, size, plan.team.chunk, plan.team.blocks, counts, place, quantiles, only_nan},
        x0, stream);
  } else if (plan.selects) {
    const TeamPlan& team = plan.team;
    launch_resident<T, V>(p, plan,
                          {team.team, static_cast<int>(team.blocks), team.teams, team.rounds(p.batch), team.chunk,
                           plan.keeps_update, only_nan, counts, place},
                          stream);
  } else {
    const float* none = nullptr;
    launch(chunks_of(p, plan.elements, device::kThreads, stream), device::step_elements<T, V>, p, plan.elements, none,
           none);
  }
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
  const Step s = make_step(sample, output, unconditional_output, previous_x0, noise, seed, rows, index, options);
  const std::optional<Tensor> needed[] = {output, rows, index};
  check_devices(sample, {&needed[0], &needed[1], &needed[2], &unconditional_output, &previous_x0, &noise, &seed});
  const OnDeviceOf on(sample);
  const int64_t nothing = 0, one = 1;
  Tensor next = uninitialized_on(sample);
  Tensor x0 =
      write_x0 ? uninitialized_on(sample) : uninitialized_on(sample, {&nothing, 1}, {&one, 1}, dtype_code(sample));
  if (sample.numel() == 0) return {next, x0};
  device::Problem p = inputs(s, rows, index);
  p.next = next.mutable_data_ptr();
  p.x0 = write_x0 ? x0.mutable_data_ptr() : nullptr;
  const Plan plan = device::make_plan(p, static_cast<int>(sample.element_size()), device_properties());
  with_type(s.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (plan.vector > 1) {
      launch_step<T, kMaxVector<T>>(s, p, plan, sample, on.stream());
    } else {
      launch_step<T, 1>(s, p, plan, sample, on.stream());
    }
  });
  return {next, x0};
}

// For tests, of a step with a dynamic threshold from a dense sample: resident (1) or not, team, blocks of a sample,
// samples at a time, whether the sum of the first terms is kept beside x0
std::vector<int64_t> plan_of(const Tensor& sample) {
  device::Problem p{};
  p.batch = sample.size(0);
  p.order = {sample.size(1), count_positions(sample), false};
  p.threshold = Threshold::kDynamic;
  const Plan plan = device::make_plan(p, static_cast<int>(sample.element_size()), device_properties());
  return {plan.team.resident, static_cast<int64_t>(plan.team.team), plan.team.blocks, plan.team.teams,
          plan.keeps_update};
}

// For tests: the words and normals of a stream's counters
std::tuple<Tensor, Tensor> philox(const Tensor& seed, int64_t row, int64_t stage, int64_t first_counter,
                                  int64_t counters) {
  STD_TORCH_CHECK(seed.numel() == 1 && dtype_code(seed) == aoti_torch_dtype_int64() && counters > 0,
                  "sampler_step: a seed in int64, and at least one counter");
  const OnDeviceOf on(seed);
  Tensor words = uninitialized_matrix_on(seed, counters, 4, aoti_torch_dtype_int32());
  Tensor normals = uninitialized_matrix_on(seed, counters, 4, aoti_torch_dtype_float32());
  LaunchConfig config;
  config.grid = static_cast<unsigned>(ceil_div<int64_t>(counters, device::kThreads));
  config.block = device::kThreads;
  config.stream = on.stream();
  launch(config, device::philox_test, static_cast<const int64_t*>(seed.const_data_ptr()), static_cast<uint32_t>(row),
         static_cast<uint32_t>(stage), static_cast<uint64_t>(first_counter), counters,
         static_cast<uint32_t*>(words.mutable_data_ptr()), static_cast<float*>(normals.mutable_data_ptr()));
  return {words, normals};
}

}  // namespace
}  // namespace imagen_fast::sampler_step

IMAGEN_FAST_CUDA_OPERATORS(library) {
  library.impl("sampler_step_cuda", TORCH_BOX(&imagen_fast::sampler_step::step));
  library.impl("_sampler_step_cuda_plan", TORCH_BOX(&imagen_fast::sampler_step::plan_of));
  library.impl("_philox_cuda", TORCH_BOX(&imagen_fast::sampler_step::philox));
}
