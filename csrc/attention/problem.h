// softmax(scale q kT + bias) v over the keys [context; own]. What the registration hands to the kernel of the chosen
// instruction set. No torch header may be included here (see ../common/number_formats.h).
#pragma once

#include <cstdint>

#include "../common/number_formats.h"
#include "../common/parameters.h"

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
};

}  // namespace imagen_fast::attention
