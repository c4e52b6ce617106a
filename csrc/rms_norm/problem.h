// s = x + residual, y = s * rstd * weight, rstd = 1 / sqrt(mean(s^2) + eps), by rows. What the registration hands to
// the kernel of the chosen instruction set.
#pragma once

#include "../common/number_formats.h"
#include "../common/parameters.h"
#include "../common/rows.h"

namespace imagen_fast::rms_norm {

struct Problem {
  DType dtype;
  int64_t outer;  // rows are (outer, inner)
  int64_t inner;
  int64_t width;
  Parameter weight;
};

struct Forward : Problem {
  double eps;
  RowViews x;
  RowViews residual;    // or no data
  MutableRowViews sum;  // if there is a residual
  MutableRowViews y;
  void* rstd;  // (outer, inner), fp32 or, where x is, fp64
};

// Gradients that are not asked for have no data.
struct Backward : Problem {
  RowViews dy;
  RowViews dsum;  // or no data
  RowViews x;     // s
  const void* rstd;
  MutableRowViews dx;
  ParameterGradient dweight;
};

}  // namespace imagen_fast::rms_norm
