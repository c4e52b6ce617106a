// Registers the CPU kernels of attention.
#include <torch/csrc/stable/library.h>

#include "../common/cpu_capability.h"
#include "arguments.h"

namespace imagen_fast {

IMAGEN_FAST_DECLARE_KERNEL(void attention_forward(const attention::Forward&))
IMAGEN_FAST_DECLARE_KERNEL(void attention_backward(const attention::Backward&))
IMAGEN_FAST_DECLARE_KERNEL(void attention_bias_gradient(const attention::Backward&))

namespace attention {
namespace {

Tensor allocate(const Tensor&, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype) {
  return uninitialized(sizes, strides, dtype);
}

void check_buckets(const Problem& p) {
  const int32_t* const bucket = p.relative.bucket;
  const int64_t diagonals = p.relative.data ? std::max<int64_t>(p.queries + p.own - 1, 0) : 0;
  STD_TORCH_CHECK(std::all_of(bucket, bucket + diagonals, [&](int32_t b) { return b >= 0 && b < p.relative.rows; }),
                  "attention: buckets must be rows of the table, 0 to ", p.relative.rows - 1);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& context_k,
                                   const Optional& context_v, const Optional& bias, const Optional& table,
                                   const Optional& buckets, const Optional& key_mask, const Optional& q_scale,
                                   const Optional& k_scale, double scale) {
  Forward f{
      problem(q, k, v, context_k, context_v, bias, table, buckets, key_mask, q_scale, k_scale, scale), {}, {}, {}};
  check_buckets(f);
  Tensor out = empty_in_order_of(q, allocate);
  Tensor lse = empty_lse(f, q, allocate);
  if (out.numel() == 0) return {out, lse};
  f.out = output_rows(out);
  f.lse = lse.mutable_data_ptr();
  f.matrix_tiles = matrix_tiles();
  IMAGEN_FAST_KERNEL(attention_forward, f.dtype)(f);
  return {out, lse};
}

NineTensors backward(const Tensor& dout, const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& k,
                     const Tensor& v, const Optional& context_k, const Optional& context_v, const Optional& bias,
                     const Optional& table, const Optional& buckets, const Optional& key_mask, const Optional& q_scale,
                     const Optional& k_scale, double scale, int64_t needs) {
  Backward f{};
  static_cast<Problem&>(f) =
      problem(q, k, v, context_k, context_v, bias, table, buckets, key_mask, q_scale, k_scale, scale);
  f.dout = rows(f, "dout", dout, f.q_heads, f.queries);
  f.out = rows(f, "out", out, f.q_heads, f.queries);
  check_buckets(f);
  check_lse(f, lse);
  f.lse = lse.const_data_ptr();
  Gradients gradients(needs, q, allocate);
  f.dq = gradients.add_rows(q);
  f.dk = gradients.add_rows(k);
  f.dv = gradients.add_rows(v);
  f.dcontext_k = gradients.add_rows(context_k);
  f.dcontext_v = gradients.add_rows(context_v);
  f.dbias = gradients.add_bias(bias);
  f.dtable = gradients.add_parameter(table);
  f.dq_scale = gradients.add_parameter(q_scale);
  f.dk_scale = gradients.add_parameter(k_scale);
  IMAGEN_FAST_KERNEL(attention_backward, f.dtype)(f);
  if (f.dbias.data && !f.has_bias_of_each_score()) IMAGEN_FAST_KERNEL(attention_bias_gradient, f.dtype)(f);
  return gradients.result();
}

}  // namespace
}  // namespace attention
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CPU, library) {
  library.impl("attention_cpu", TORCH_BOX(&imagen_fast::attention::forward));
  library.impl("attention_backward_cpu", TORCH_BOX(&imagen_fast::attention::backward));
}
