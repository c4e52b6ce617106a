// y = gelu(gate) * value, by rows. What the registration hands to the kernel of the chosen instruction set.
#pragma once

#include "../common/number_formats.h"
#include "../common/rows.h"

namespace imagen_fast::gated_gelu {

struct Problem {
  DType dtype;
  bool tanh;      // the approximation of gelu, or the exact one
  int64_t outer;  // rows are (outer, inner)
  int64_t inner;
  int64_t width;
  RowViews gate;
  RowViews value;
};

struct Forward : Problem {
  MutableRowViews y;
};

// Gradients that are not asked for have no data.
struct Backward : Problem {
  RowViews dy;
  MutableRowViews dgate;
  MutableRowViews dvalue;
};

}  // namespace imagen_fast::gated_gelu
