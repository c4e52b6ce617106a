// rms_norm on the CPU, and its gradient. Compiled once per instruction set.
//
// With s the normalised sum, xhat = s * rstd and g = dy * weight:
//   dx = rstd * (g - xhat * mean(g * xhat)) + dsum
//   dweight = sum over rows of dy * xhat
#include <cmath>

#include "../common/buffer.h"
#include "../common/element_types.h"
#include "../common/parallel.h"
#include "../common/vec.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace {

template <typename S>
void read_weight(const imagen_fast::rms_norm::Problem& p, S* weight) {
  for (int64_t c = 0; c < p.width; ++c) weight[c] = read(p.weight, 0, c, S(1));
}

// The sum over a row of n elements, in parts that are each 64 additions deep; part_sum(first, size) is that of one.
template <typename S, typename PartSum>
IMAGEN_FAST_INLINE S row_sum(int64_t n, PartSum&& part_sum) {
  constexpr int64_t kPart = 64 * Wide<S>::kWidth;
  if (n <= kPart) return part_sum(int64_t{0}, n);
  double total = 0;
  for (int64_t first = 0; first < n; first += kPart) total += part_sum(first, n - first < kPart ? n - first : kPart);
  return static_cast<S>(total);
}

// sum = x + residual, rounded to T
template <typename T>
void add_row(const T* x, const T* residual, T* sum, int64_t n) {
  using S = AccumulateType<T>;
  for_each_vector<S>(
      n, [&](int64_t i, auto lanes) { store(load(x + i, lanes) + load(residual + i, lanes), sum + i, lanes); });
}

template <typename T>
void forward(const imagen_fast::rms_norm::Forward& f) {
  using S = AccumulateType<T>;
  Buffer<S> weight(f.width);
  read_weight(f, weight.data());
  parallel_for(f.outer * f.inner, f.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* s = row<T>(f.x, r, f.inner);
      if (f.residual.data) {
        T* sum = row<T>(f.sum, r, f.inner);
        add_row(s, row<T>(f.residual, r, f.inner), sum, f.width);
        s = sum;
      }
      const S squares = row_sum<S>(f.width, [&](int64_t first, int64_t n) {
        RowSum<S> sum;
        for_each_vector<S>(n, [&](int64_t i, auto lanes) {
          const auto v = load(s + first + i, lanes);
          sum.add_product(v, v, lanes);
        });
        return sum.total();
      });
      const S mean = squares / static_cast<S>(f.width);
      const S rstd = S(1) / std::sqrt(mean + static_cast<S>(f.eps));
      static_cast<S*>(f.rstd)[r] = rstd;
      T* y = row<T>(f.y, r, f.inner);
      for_each_vector<S>(f.width, [&](int64_t i, auto lanes) {
        using V = typename decltype(lanes)::V;
        store(load(s + i, lanes) * V(rstd) * load(weight.data() + i, lanes), y + i, lanes);
      });
    }
  });
}

// mean(g * xhat) / xhat's factor: sum(dy * weight * s) * rstd / C
template <typename T, typename S>
S mean_product(const T* dy, const T* s, const S* weight, S rstd, int64_t n) {
  const S total = row_sum<S>(n, [&](int64_t first, int64_t size) {
    RowSum<S> sum;
    for_each_vector<S>(size, [&](int64_t i, auto lanes) {
      sum.add_product(load(dy + first + i, lanes) * load(weight + first + i, lanes), load(s + first + i, lanes), lanes);
    });
    return sum.total();
  });
  return total * rstd / static_cast<S>(n);
}

// dx of one row; dsum may be null
template <typename T, typename S>
void dx_row(const T* dy, const T* dsum, const T* s, const S* weight, S rstd, T* dx, int64_t n) {
  const S slope = mean_product(dy, s, weight, rstd, n) * rstd;
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V g = load(dy + i, lanes) * load(weight + i, lanes);
    const V d = V(rstd) * fma(load(s + i, lanes), V(-slope), g);
    store(dsum ? d + load(dsum + i, lanes) : d, dx + i, lanes);
  });
}

// Sums over rows are taken in blocks of them, whose size depends on the number of rows alone, so that sums do not
// depend on the number of threads: about kBlocks blocks, unless they would have too few rows, or more than kMostRows. A
// sum over a block is a chain of that many additions; over blocks it is in double.
constexpr int64_t kBlocks = 64;
constexpr int64_t kFewestRows = 16;
constexpr int64_t kMostRows = 128;

template <typename T>
void backward(const imagen_fast::rms_norm::Backward& b) {
  using S = AccumulateType<T>;
  const int64_t rows = b.outer * b.inner;
  int64_t block = ceil_div(rows, kBlocks);
  block = block < kFewestRows ? kFewestRows : block > kMostRows ? kMostRows : block;
  const int64_t blocks = ceil_div(rows, block);
  const bool needs_weight = b.dweight.data;
  Buffer<S> weight(b.width);
  Buffer<S> partial(needs_weight ? blocks * b.width : 0);
  read_weight(b, weight.data());
  parallel_for(blocks, block * b.width, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      S* dweight = needs_weight ? partial.data() + k * b.width : nullptr;
      for (int64_t c = 0; needs_weight && c < b.width; ++c) dweight[c] = 0;
      const int64_t last = (k + 1) * block < rows ? (k + 1) * block : rows;
      for (int64_t r = k * block; r < last; ++r) {
        const T* dy = row<T>(b.dy, r, b.inner);
        const T* s = row<T>(b.x, r, b.inner);
        const S rstd = static_cast<const S*>(b.rstd)[r];
        if (b.dx.data) {
          const T* dsum = b.dsum.data ? row<T>(b.dsum, r, b.inner) : nullptr;
          dx_row(dy, dsum, s, weight.data(), rstd, row<T>(b.dx, r, b.inner), b.width);
        }
        if (!needs_weight) continue;
        for_each_vector<S>(b.width, [&](int64_t i, auto lanes) {
          using V = typename decltype(lanes)::V;
          const V xhat = load(s + i, lanes) * V(rstd);
          store(fma(load(dy + i, lanes), xhat, load(dweight + i, lanes)), dweight + i, lanes);
        });
      }
    }
  });
  if (!needs_weight) return;
  parallel_for(b.width, blocks, [&](int64_t begin, int64_t end) {
    Buffer<double> sums(end - begin);
    for (int64_t c = begin; c < end; ++c) sums[c - begin] = 0;
    for (int64_t k = 0; k < blocks; ++k) {
      const S* block_sums = partial.data() + k * b.width;
      for (int64_t c = begin; c < end; ++c) sums[c - begin] += block_sums[c];
    }
    for (int64_t c = begin; c < end; ++c) write(b.dweight, c, sums[c - begin]);
  });
}

}  // namespace

void rms_norm_forward(const imagen_fast::rms_norm::Forward& f) {
  with_element_type(f.dtype, [&](auto element) { forward<decltype(element)>(f); });
}

void rms_norm_backward(const imagen_fast::rms_norm::Backward& b) {
  with_element_type(b.dtype, [&](auto element) { backward<decltype(element)>(b); });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
