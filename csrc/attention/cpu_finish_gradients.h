// From sums over queries or keys to the gradients of q, k, v, the context and the two scales.
//
// With xhat = x / max(|x|, 1e-12) and g the gradient of xn = xhat * scale,
//   dscale = sum g xhat    dx = (g scale - xhat sum_d(g scale xhat)) / |x|      where |x| is not below 1e-12
#pragma once

#include "../common/parallel.h"
#include "cpu_pack.h"

namespace imagen_fast::IMAGEN_FAST_ISA::attention {

// What is to be summed: `count` arrays of (rows, width), `stride` apart, for each (sample, head)
template <typename S>
struct Partials {
  const S* data;
  int64_t count;
  int64_t stride;
  int64_t head_stride;
  int64_t row;  // from one row to the next
};

// A segment of the rows of every (sample, head)
struct Finish {
  int64_t batch, heads, rows, width;
  int64_t offset;  // the segment's first row in the partial sums
  double factor;
  HeadRows x;     // for normalised rows
  HeadOutput dx;  // null: only the scale's gradient
};

constexpr int64_t kFinishRows = 64;

inline int64_t finish_units(const Finish& f) { return f.batch * f.heads * ceil_div(f.rows, kFinishRows); }

// The gradient of a normalised row, in place, and of the scale, added to dscale
template <typename S, typename T>
void through_normalization(const T* x, const S* scale, int64_t width, S* g, S* dscale) {
  const S inverse = inverse_norm<S>(x, width);
  RowSum<S> products;
  for_each_vector<S>(width, [&](int64_t d, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V xhat = load(x + d, lanes) * V(inverse);
    const V gradient = load(g + d, lanes);
    store(fma(gradient, xhat, load(dscale + d, lanes)), dscale + d, lanes);
    const V dxhat = gradient * load(scale + d, lanes);
    store(dxhat, g + d, lanes);
    products.add_product(dxhat, xhat, lanes);
  });
  // Where the norm is held at its smallest value, it has no gradient.
  const S along = inverse * S(kSmallestNorm) < 1 ? products.total() : S(0);
  for_each_vector<S>(width, [&](int64_t d, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V xhat = load(x + d, lanes) * V(inverse);
    store((load(g + d, lanes) - xhat * V(along)) * V(inverse), g + d, lanes);
  });
}

// `scale` is null where rows are not normalised; else dscale takes (finish_units, width) sums.
template <typename T, typename S>
void finish_gradients(const Finish& f, const Partials<S>& partials, const S* scale, S* dscale) {
  const int64_t blocks = ceil_div(f.rows, kFinishRows);
  parallel_for(finish_units(f), kFinishRows * f.width * (partials.count + 1), [&](int64_t begin, int64_t end) {
    Buffer<S> sum(f.width);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / blocks;
      const int64_t first = unit % blocks * kFinishRows;
      const int64_t last = first + kFinishRows < f.rows ? first + kFinishRows : f.rows;
      if (scale) std::memset(dscale + unit * f.width, 0, f.width * sizeof(S));
      for (int64_t r = first; r < last; ++r) {
        const S* const from = partials.data + head * partials.head_stride + (f.offset + r) * partials.row;
        for_each_vector<S>(f.width, [&](int64_t d, auto lanes) {
          using V = typename decltype(lanes)::V;
          V total(S(0));
          for (int64_t i = 0; i < partials.count; ++i) total = total + load(from + i * partials.stride + d, lanes);
          store(total * V(static_cast<S>(f.factor)), sum.data() + d, lanes);
        });
        const int64_t b = head / f.heads, h = head % f.heads;
        if (scale) {
          const T* const x = static_cast<const T*>(f.x.data) + b * f.x.stride_b + h * f.x.stride_h + r * f.x.stride_l;
          through_normalization(x, scale, f.width, sum.data(), dscale + unit * f.width);
        }
        if (!f.dx.data) continue;
        T* const to = static_cast<T*>(f.dx.data) + b * f.dx.stride_b + h * f.dx.stride_h + r * f.dx.stride_l;
        for_each_vector<S>(f.width, [&](int64_t d, auto lanes) { store(load(sum.data() + d, lanes), to + d, lanes); });
      }
    }
  });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA::attention
