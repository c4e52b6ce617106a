// Registers the CUDA kernels of attention.
#include <torch/csrc/stable/ops.h>

#include "../common/cuda_tensor.h"
#include "arguments.h"
#include "kernel_normalize.cuh"
#include "launches.h"

namespace imagen_fast::attention {
namespace {

void check_devices(const Tensor& q, std::initializer_list<std::pair<const char*, Optional>> others) {
  for (const auto& [name, x] : others) {
    STD_TORCH_CHECK(!x || (x->is_cuda() == q.is_cuda() && x->get_device() == q.get_device()), "attention: ", name,
                    " must be on the device of q");
  }
}

int size(int64_t n) {
  STD_TORCH_CHECK(n < int64_t{1} << 30, "attention: the CUDA kernels take sizes below 2^30, got ", n);
  return static_cast<int>(n);
}

device::Rows device_rows(const HeadRows& x, int64_t batch, int64_t heads, int64_t length, DType dtype) {
  const int64_t element = dtype == DType::kFloat ? 4 : 2;
  const auto aligned = [&](int64_t stride, int64_t count) { return count <= 1 || stride * element % 16 == 0; };
  return {x.data, x.stride_b, x.stride_h, x.stride_l,
          is_aligned(x.data, 16) && aligned(x.stride_b, batch) && aligned(x.stride_h, heads) &&
              aligned(x.stride_l, length)};
}

device::Output device_output(const HeadOutput& x) { return {x.data, x.stride_b, x.stride_h, x.stride_l, false}; }

device::Problem device_problem(const Problem& p) {
  STD_TORCH_CHECK(p.dtype != DType::kDouble, "attention: the CUDA kernels take float16, bfloat16 and float32");
  STD_TORCH_CHECK(p.width <= device::kWidest, "attention: the CUDA kernels take heads of a width up to 256");
  STD_TORCH_CHECK(!p.relative.data || p.relative.rows > 0, "attention: table must have rows");
  const auto rows = [&](const HeadRows& x, int64_t heads, int64_t length) {
    return device_rows(x, p.batch, heads, length, p.dtype);
  };
  device::Problem d{};
  d.q_heads = size(p.q_heads);
  d.kv_heads = size(p.kv_heads);
  d.queries = size(p.queries);
  d.width = size(p.width);
  d.scale = static_cast<float>(p.scale);
  d.q = rows(p.q, p.q_heads, p.queries);
  d.context = {rows(p.context_k, p.kv_heads, p.context), rows(p.context_v, p.kv_heads, p.context), size(p.context), 0};
  d.own = {rows(p.k, p.kv_heads, p.own), rows(p.v, p.kv_heads, p.own), size(p.own), size(p.context)};
  d.bias = p.bias;
  d.relative = p.relative;
  d.key_mask = p.key_mask;
  d.key_mask_stride = p.key_mask_stride;
  return d;
}

Tensor floats(const Tensor& like, int64_t count) {
  return empty_contiguous(like, {&count, 1}, aoti_torch_dtype_float32(), uninitialized_on);
}

float* data_of(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Normalised copies of q, k and the context, which the problem refers to instead in the backward pass, as its kernels
// read them several times; kept here as long as kernels are launched.
class Normalized {
 public:
  Normalized(const Problem& p, const Tensor& q, Stream stream, device::Problem* d) {
    if (!p.q_scale.data) return;
    normalize(p, q, p.q_heads, d->queries, p.q_scale, stream, &d->q);
    normalize(p, q, p.kv_heads, d->context.count, p.k_scale, stream, &d->context.k);
    normalize(p, q, p.kv_heads, d->own.count, p.k_scale, stream, &d->own.k);
  }

 private:
  void normalize(const Problem& p, const Tensor& q, int64_t heads, int length, const Parameter& scale, Stream stream,
                 device::Rows* x) {
    const int64_t sizes[] = {p.batch, heads, length, p.width};
    const int64_t rows = p.batch * heads * length;
    if (rows == 0) return;
    copies_.push_back(empty_contiguous(q, {sizes, 4}, dtype_code(q), uninitialized_on));
    void* const y = copies_.back().mutable_data_ptr();
    const device::Normalize f{*x, y, scale, static_cast<int>(heads), length, static_cast<int>(p.width), rows};
    with_type(p.dtype, [&](auto type) {
      launch(launch_config(ceil_div<int64_t>(rows, device::kRowWarps), device::kRowWarps, 0, stream),
             device::normalize<typename decltype(type)::type>, f);
    });
    *x = {y, heads * length * p.width, length * p.width, p.width, true};
  }

  std::vector<Tensor> copies_;
};

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& context_k,
                                   const Optional& context_v, const Optional& bias, const Optional& table,
                                   const Optional& buckets, const Optional& key_mask, const Optional& q_scale,
                                   const Optional& k_scale, double scale) {
  const Problem p = problem(q, k, v, context_k, context_v, bias, table, buckets, key_mask, q_scale, k_scale, scale);
  device::Forward f{};
  static_cast<device::Problem&>(f) = device_problem(p);
  check_devices(q, {{"k", k},
                    {"v", v},
                    {"context_k", context_k},
                    {"context_v", context_v},
                    {"bias", bias},
                    {"table", table},
                    {"buckets", buckets},
                    {"key_mask", key_mask},
                    {"q_scale", q_scale},
                    {"k_scale", k_scale}});
  const OnDeviceOf on(q);
  Tensor out = empty_in_order_of(q, uninitialized_on);
  Tensor lse = empty_lse(p, q, uninitialized_on);
  if (out.numel() == 0) return {out, lse};
  f.q_scale = p.q_scale;
  f.k_scale = p.k_scale;
  f.out = device_output(output_rows(out));
  f.lse = data_of(lse);
  launch_forward(p.dtype, f, p.batch, on.stream());
  return {out, lse};
}

// The gradients of one problem: which kernels they need, and in which order.
class BackwardPass {
 public:
  BackwardPass(const Problem& p, const device::Backward& shared, const device::Problem& original, const Tensor& q,
               Stream stream)
      : p_(p), shared_(shared), original_(original), q_(q), stream_(stream) {}

  void queries(const HeadOutput& dq, const ParameterGradient& dtable, const ParameterGradient& dq_scale) {
    if (!dq.data && !dtable.data && !dq_scale.data) return;
    device::QueryGradients f{};
    static_cast<device::Backward&>(f) = shared_;
    const bool through_norm = p_.q_scale.data && (dq.data || dq_scale.data);
    std::optional<Tensor> wide;
    f.dq = through_norm ? wide_rows(&wide, p_.q_heads, p_.queries) : device_output(dq);
    std::optional<Tensor> partial;
    int64_t blocks = 0;
    if (dtable.data) {
      blocks = p_.batch * query_blocks();
      partial = floats(q_, blocks * p_.q_heads * p_.relative.rows);
      f.dtable = data_of(*partial);
    }
    launch_backward_queries(p_.dtype, f, p_.batch, stream_);
    if (dtable.data) {
      // Each head's buckets become a column.
      sum_rows(*partial, blocks, p_.q_heads * p_.relative.rows, p_.q_heads, dtable);
    }
    if (!through_norm) return;
    const int64_t finished = finish_blocks(p_.q_heads, p_.queries);
    Tensor terms = floats(q_, finished * p_.width);
    finish(original_.q, p_.q_scale, p_.q_heads, p_.queries, *wide, dq, data_of(terms));
    if (dq_scale.data) sum_rows(terms, finished, p_.width, 1, dq_scale);
  }

  void keys(const HeadOutput& dk, const HeadOutput& dv, const HeadOutput& dcontext_k, const HeadOutput& dcontext_v,
            const ParameterGradient& dk_scale) {
    const int64_t of_context = finish_blocks(p_.kv_heads, p_.context), of_own = finish_blocks(p_.kv_heads, p_.own);
    std::optional<Tensor> terms;
    if (p_.k_scale.data) terms = floats(q_, (of_context + of_own) * p_.width);
    segment(false, dcontext_k, dcontext_v, dk_scale.data, terms ? data_of(*terms) : nullptr);
    segment(true, dk, dv, dk_scale.data, terms ? data_of(*terms) + of_context * p_.width : nullptr);
    if (dk_scale.data) sum_rows(*terms, of_context + of_own, p_.width, 1, dk_scale);
  }

  void bias(const BiasGradient& dbias) {
    device::BiasGradients f{};
    static_cast<device::Backward&>(f) = shared_;
    f.dbias = dbias;
    f.samples = static_cast<int>(p_.batch);
    launch_backward_bias(p_.dtype, f, stream_);
  }

 private:
  void segment(bool of_own, const HeadOutput& dk, const HeadOutput& dv, bool needs_scale, float* terms) {
    const int64_t keys = of_own ? p_.own : p_.context;
    if ((!dk.data && !dv.data && !needs_scale) || keys == 0) return;
    device::KeyGradients f{};
    static_cast<device::Backward&>(f) = shared_;
    f.of_own = of_own;
    f.dv = device_output(dv);
    const bool through_norm = p_.k_scale.data && (dk.data || needs_scale);
    std::optional<Tensor> wide;
    f.dk = through_norm ? wide_rows(&wide, p_.kv_heads, keys) : device_output(dk);
    launch_backward_keys(p_.dtype, f, p_.batch, stream_);
    if (!through_norm) return;
    finish(of_own ? original_.own.k : original_.context.k, p_.k_scale, p_.kv_heads, keys, *wide, dk, terms);
  }

  int64_t query_blocks() const {
    return device::with_type_and_width(p_.dtype, shared_.width, [&](auto type, auto width) {
      using T = typename decltype(type)::type;
      const device::Tiles tiles =
          device::plan_queries<T, decltype(width)::value>(shared_, true, p_.batch, device_properties());
      return ceil_div<int64_t>(p_.queries, 16 * tiles.warps);
    });
  }

  // (B, H, L, D) in float
  device::Output wide_rows(std::optional<Tensor>* tensor, int64_t heads, int64_t length) const {
    *tensor = floats(q_, p_.batch * heads * length * p_.width);
    return {data_of(**tensor), heads * length * p_.width, length * p_.width, p_.width, true};
  }

  int64_t finish_blocks(int64_t heads, int64_t length) const {
    return ceil_div<int64_t>(p_.batch * heads * length, device::kFinishRows);
  }

  // From the gradient of normalised rows to that of the rows and, as terms of a sum, of their scale
  void finish(const device::Rows& x, const Parameter& scale, int64_t heads, int64_t length, Tensor& dy,
              const HeadOutput& dx, float* terms) const {
    const device::FinishNormalized f{x,
                                     data_of(dy),
                                     device_output(dx),
                                     terms,
                                     scale,
                                     static_cast<int>(heads),
                                     static_cast<int>(length),
                                     static_cast<int>(p_.width),
                                     p_.batch * heads * length};
    with_type(p_.dtype, [&](auto type) {
      launch(launch_config(finish_blocks(heads, length), device::kRowWarps, 0, stream_),
             device::finish_normalized<typename decltype(type)::type>, f);
    });
  }

  void sum_rows(Tensor& from, int64_t rows, int64_t columns, int64_t outer, const ParameterGradient& to) const {
    const device::SumRows f{data_of(from), rows, size(columns), size(outer), to};
    launch(launch_config(ceil_div<int64_t>(columns, kWarpSize), device::kSumWarps, 0, stream_), device::sum_rows, f);
  }

  const Problem& p_;
  const device::Backward& shared_;
  const device::Problem& original_;  // whose rows are not normalised
  const Tensor& q_;
  const Stream stream_;
};

NineTensors backward(const Tensor& dout, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
                     const Tensor& v, const Optional& context_k, const Optional& context_v, const Optional& bias,
                     const Optional& table, const Optional& buckets, const Optional& key_mask, const Optional& q_scale,
                     const Optional& k_scale, double scale, int64_t needs) {
  const Problem p = problem(q, k, v, context_k, context_v, bias, table, buckets, key_mask, q_scale, k_scale, scale);
  const device::Problem original = device_problem(p);
  check_devices(q, {{"dout", dout},
                    {"out", out},
                    {"lse", lse},
                    {"k", k},
                    {"v", v},
                    {"context_k", context_k},
                    {"context_v", context_v},
                    {"bias", bias},
                    {"table", table},
                    {"buckets", buckets},
                    {"key_mask", key_mask},
                    {"q_scale", q_scale},
                    {"k_scale", k_scale}});
  rows(p, "out", out, p.q_heads, p.queries);
  check_lse(p, lse);
  const OnDeviceOf on(q);
  device::Backward f{};
  static_cast<device::Problem&>(f) = original;
  f.dout = device_rows(rows(p, "dout", dout, p.q_heads, p.queries), p.batch, p.q_heads, p.queries, p.dtype);
  f.lse = static_cast<const float*>(lse.const_data_ptr());
  Gradients gradients(needs, q, uninitialized_on);
  const HeadOutput dq = gradients.add_rows(q);
  const HeadOutput dk = gradients.add_rows(k);
  const HeadOutput dv = gradients.add_rows(v);
  const HeadOutput dcontext_k = gradients.add_rows(context_k);
  const HeadOutput dcontext_v = gradients.add_rows(context_v);
  const BiasGradient dbias = gradients.add_bias(bias);
  const ParameterGradient dtable = gradients.add_parameter(table);
  const ParameterGradient dq_scale = gradients.add_parameter(q_scale);
  const ParameterGradient dk_scale = gradients.add_parameter(k_scale);
  if (q.numel() == 0 || p.keys() == 0) {
    for (Tensor& gradient : gradients.all()) torch::stable::fill_(gradient, 0);
    return gradients.result();
  }
  const Normalized normalized(p, q, on.stream(), &f);
  f.statistics_stride = ceil_div(f.queries, 4) * 4;
  Tensor statistics = floats(q, p.batch * p.q_heads * 3 * f.statistics_stride);
  f.statistics = data_of(statistics);
  launch_statistics(p.dtype, f, p.batch, on.stream());
  BackwardPass pass(p, f, original, q, on.stream());
  pass.queries(dq, dtable, dq_scale);
  pass.keys(dk, dv, dcontext_k, dcontext_v, dk_scale);
  if (dbias.data && dbias.keys > 1) {
    pass.bias(dbias);
  } else if (dbias.data) {  // what all keys of a query share does not change their softmax
    torch::stable::fill_(gradients.all()[5], 0);
  }
  return gradients.result();
}

// For tests. Forward: rows of a block, warps, stages; gradients of queries, of a table's too, and of own keys: rows of
// a block, stages.
std::vector<int64_t> plan_of(const Tensor& q, const Tensor& k, const Optional& table, const Optional& buckets) {
  const Problem p = problem(q, k, k, {}, {}, {}, table, buckets, {}, {}, {}, 1.0);
  const device::Problem d = device_problem(p);
  return device::with_type_and_width(p.dtype, d.width, [&](auto type, auto width) -> std::vector<int64_t> {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    const DeviceProperties& properties = device_properties();
    const device::ForwardPlan forward = device::plan_forward<T, W>(d, p.q_scale.data, p.batch, properties);
    const device::Tiles queries = device::plan_queries<T, W>(d, p.relative.data, p.batch, properties);
    const device::Tiles keys = device::plan_keys<T, W>(d, true, p.batch, properties);
    return {16 * forward.row_tiles * forward.tiles.warps,
            forward.tiles.warps,
            forward.tiles.stages,
            16 * queries.warps,
            queries.stages,
            16 * keys.warps,
            keys.stages};
  });
}

}  // namespace
}  // namespace imagen_fast::attention

IMAGEN_FAST_CUDA_OPERATORS(library) {
  library.impl("attention_cuda", TORCH_BOX(&imagen_fast::attention::forward));
  library.impl("attention_backward_cuda", TORCH_BOX(&imagen_fast::attention::backward));
  library.impl("_attention_cuda_plan", TORCH_BOX(&imagen_fast::attention::plan_of));
}
