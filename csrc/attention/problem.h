// softmax(scale q kT + bias) v over the keys [context; own]. What the registration hands to the kernel of the chosen
// instruction set. No torch header may be included here (see ../common/number_formats.h).
#pragma once

#include <cstdint>

#include "../common/number_formats.h"
#include "../common/parameters.h"
#include "matrix_tiles.h"

namespace imagen_fast::attention {

// (B, H, L, D) with a stride of 1 along D
template <typename Void>
struct HeadRowsOf {
  Void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_h = 0;
  int64_t stride_l = 0;
};
using HeadRows = HeadRowsOf<const void>;
using HeadOutput = HeadRowsOf<void>;

// (B, Hq, Lq, Lc + Lk) by strides, 0 where it is broadcast and along keys 0 or 1; absent if data is null.
struct Bias {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t stride_b = 0;
  int64_t stride_h = 0;
  int64_t stride_i = 0;
  int64_t stride_j = 0;
};

// bias[h, i, Lc + j] = table[bucket[j - i + Lq - 1], h]; absent if data is null.
struct RelativeBias {
  const void* data = nullptr;  // (rows, Hq)
  DType dtype = DType::kFloat;
  int64_t rows = 0;
  const int32_t* bucket = nullptr;
};

struct Problem {
  DType dtype;  // of q, k, v, the context and their gradients
  int64_t batch;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t queries;
  int64_t context;  // keys of the context
  int64_t own;      // keys beside them
  int64_t width;    // D
  double scale;
  HeadRows q, k, v, context_k, context_v;
  Bias bias;
  RelativeBias relative;
  const bool* key_mask = nullptr;  // (B, Lc + Lk), or null
  int64_t key_mask_stride = 0;
  Parameter q_scale, k_scale;  // (D,)

  int64_t keys() const { return context + own; }
};

// lse is (B, Hq, Lq), fp32, or fp64 where q is.
struct Forward : Problem {
  HeadOutput out;
  void* lse;
  MatrixTiles matrix_tiles;
};

// (B, Hq, Lq, Lc + Lk), each size that of the scores or 1, contiguous; not asked for if data is null.
struct BiasGradient {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t batch = 1, heads = 1, queries = 1, keys = 1;
};

// Gradients whose data is null are not asked for.
struct Backward : Problem {
  HeadRows dout, out;
  const void* lse;
  HeadOutput dq, dk, dv, dcontext_k, dcontext_v;
  BiasGradient dbias;
  ParameterGradient dtable;  // (rows, Hq)
  ParameterGradient dq_scale, dk_scale;

  bool needs_dq() const { return dq.data || dq_scale.data; }
  bool needs_dk() const { return dk.data || dcontext_k.data || dk_scale.data; }
  bool needs_dv() const { return dv.data || dcontext_v.data; }

  // Whether each element of the bias belongs to one score; the gradient of others has a kernel of its own.
  bool has_bias_of_each_score() const {
    return dbias.batch == batch && dbias.heads == q_heads && dbias.queries == queries && dbias.keys == keys();
  }
};

}  // namespace imagen_fast::attention
