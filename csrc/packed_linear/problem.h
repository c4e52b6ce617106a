// y = x W^T + bias + add, of rows in bfloat16, with a weight that was packed before. What the registration hands to the
// kernel of the chosen instruction set.
//
// A packed weight is cut into panels of 64 of its rows, which are columns of the result; what is missing in the last
// one is zeros. In a panel a pair of successive terms of the sum lies beside that of the next column:
//
//     packed[panel][term / 2][column][term % 2]
#pragma once

#include "../common/number_formats.h"
#include "../common/rows.h"

namespace imagen_fast::packed_linear {

constexpr int64_t kPanel = 64;

struct Pack {
  const BFloat16* weight;  // (columns, terms)
  int64_t stride;          // from one row of the weight to the next; terms are dense
  int64_t columns;
  int64_t terms;
  BFloat16* packed;
};

struct Forward {
  RowViews x;  // rows (outer, inner) of `terms`, even
  int64_t outer;
  int64_t inner;
  int64_t terms;
  RowViews more;       // rows that continue those of x, or absent
  int64_t more_terms;  // even; 0 if absent
  int64_t columns;
  const BFloat16* packed;  // for all terms
  const BFloat16* bias;    // (columns,) or null
  RowViews add;            // rows of `columns`, or absent
  MutableRowViews y;
};

}  // namespace imagen_fast::packed_linear
