// The gradient of the scores, a block of queries by a block of columns at a time, for all that is made of it:
//   P = exp(s - lse)    dP = dout vT    dS = P (dP - delta)    delta = sum_d dout out = sum_j P dP
#pragma once

#include "cpu_scores.h"

namespace imagen_fast::IMAGEN_FAST_ISA::attention {

// Queries to a block, and columns: the two matrices of such a block stay in the second-level cache.
constexpr int64_t kGradientQueries = 8 * kTileRows;
template <typename S>
constexpr int64_t kGradientColumns = 2 * kTileColumns<S>;

// Above, the rounding of lse alone makes weights wrong by 64 ulp.
template <typename S>
constexpr S kLargeLse = 64;

template <typename S>
inline int64_t gradient_blocks(const Columns<S>& columns) {
  return ceil_div(columns.count, kGradientColumns<S>);
}

// to[first + i] = from[i]
template <typename S>
inline void write_row(const BiasGradient& gradient, int64_t first, const S* from, int64_t n) {
  const auto write = [&](auto* to) {
    for_each_vector<S>(n, [&](int64_t i, auto lanes) { store(load(from + i, lanes), to + first + i, lanes); });
  };
  if constexpr (std::is_same_v<S, double>) {
    write(static_cast<double*>(gradient.data));
  } else {
    switch (gradient.dtype) {
      case DType::kHalf: return write(static_cast<Half*>(gradient.data));
      case DType::kBFloat16: return write(static_cast<BFloat16*>(gradient.data));
      default: return write(static_cast<float*>(gradient.data));
    }
  }
}

template <typename T, typename E>
class ScoreGradients {
  using S = typename Step<E>::S;
  static constexpr int kTerms = Step<E>::kTerms;

 public:
  static constexpr int64_t kRow = kGradientColumns<S>;

  ScoreGradients(const Backward& f, const Columns<S>& columns)
      : f_(f),
        columns_(columns),
        q_scale_(f.q_scale, f.width),
        k_scale_(f.k_scale, f.width),
        additions_(f, columns),
        keys_(columns, f.width, f.width, true, f.needs_dq()),
        values_(columns, f.width, f.width, true, false),
        q_(kGradientQueries * f.width),
        dout_(kGradientQueries * f.width),
        weights_(kGradientQueries * kRow),
        dscores_(kGradientQueries * kRow) {}

  // Sample b and query head h, and of its columns [begin, end), whole blocks
  void start_head(int64_t b, int64_t h, int64_t begin, int64_t end) {
    const int64_t kv_head = h / (f_.q_heads / f_.kv_heads);
    if (b != b_ || kv_head != kv_head_) packed_begin_ = packed_end_ = 0;
    if (b != b_) additions_.start_sample(b);
    if (b != b_ || h != h_) additions_.start_head(h);
    b_ = b;
    h_ = h;
    kv_head_ = kv_head;
    pack(begin, end);
  }

  // Queries [first, first + rows)
  void start_queries(int64_t first, int64_t rows) {
    first_ = first;
    rows_ = rows;
    const T* const dout = at(f_.dout);
    const T* const out = at(f_.out);
    load_rows(at(f_.q), f_.q.stride_l, rows, kGradientQueries, f_.width, q_scale_.data(), q_.data(), f_.width);
    load_rows(dout, f_.dout.stride_l, rows, kGradientQueries, f_.width, static_cast<const S*>(nullptr), dout_.data(),
              f_.width);
    const S* const lse = static_cast<const S*>(f_.lse) + (b_ * f_.q_heads + h_) * f_.queries + first;
    bool exact = columns_.count <= kRow || f_.dtable.data ||
                 (!std::is_same_v<T, S> && (f_.dbias.data || f_.dq_scale.data || f_.dk_scale.data));
    for (int64_t i = 0; i < rows; ++i) {
      // A query with nothing to attend to has no weights.
      lse_[i] = lse[i] == -kInfinity<S> ? kInfinity<S> : lse[i];
      factor_[i] = 1;
      delta_[i] = dot(dout + i * f_.dout.stride_l, out + i * f_.out.stride_l, f_.width);
      exact = exact || (std::fabs(lse_[i]) > kLargeLse<S> && lse_[i] != kInfinity<S>);
    }
    if (exact) add_up_factor_and_delta();
  }

  // Of the columns [column, column + n)
  void compute(int64_t column, int64_t n) {
    compute_weights(column, n);
    for (int64_t i = 0; i < rows_; ++i) {
      S* const row = weights_.data() + i * kRow;
      S* const drow = dscores_.data() + i * kRow;
      if (f_.keys() == 1) {  // whose weight is 1, whatever its score
        std::memset(drow, 0, n * sizeof(S));
      } else {
        for (int64_t j = 0; j < n; j += Vec<S>::kWidth) {
          const Vec<S> weight = Vec<S>::load(row + j) * Vec<S>(factor_[i]);
          weight.store(row + j);
          (weight * (Vec<S>::load(drow + j) - Vec<S>(delta_[i]))).store(drow + j);
        }
      }
    }
  }

  // P and dS, (rows, columns), kRow apart
  const S* weights() { return weights_.data(); }
  const S* dscores() { return dscores_.data(); }

  // (kGradientQueries, D) each, as they are multiplied; zeros in rows beyond the last
  const E* q() { return q_.data(); }
  const E* dout() { return dout_.data(); }
  Packed<E>& keys() { return keys_; }

 private:
  const T* at(const HeadRows& x) const {
    return static_cast<const T*>(x.data) + b_ * x.stride_b + h_ * x.stride_h + first_ * x.stride_l;
  }

  // P and, in the place of dS, dP
  void compute_weights(int64_t column, int64_t n) {
    const int64_t steps = f_.width / kTerms;
    multiply<E, Store::kScaled>({q_.data(), f_.width, kTerms}, keys_.keys_in_columns(column), keys_.panel(),
                                {weights_.data(), kRow}, rows_, n, steps, static_cast<S>(f_.scale));
    multiply<E, Store::kScaled>({dout_.data(), f_.width, kTerms}, values_.keys_in_columns(column), values_.panel(),
                                {dscores_.data(), kRow}, rows_, n, steps, S(1));
    for (int64_t i = 0; i < rows_; ++i) {
      S* const row = weights_.data() + i * kRow;
      additions_.add(first_ + i, column, n, row);
      exponentials<S>(row, lse_[i], n, row);
    }
  }

  // With one more pass over all columns. lse is rounded, by as much as it is large: beside a bias of the lowest number,
  // the sum's share in it is lost. `out` is rounded to q's dtype, which a gradient of higher precision would show. In
  // the gradient of a table, long sums of dS may all but cancel. And of few columns one may have nearly all the weight,
  // and a dS next to nothing.
  void add_up_factor_and_delta() {
    pack(0, columns_.count);
    if (columns_.count <= kRow) return add_up_one_block();
    S sum[kGradientQueries] = {};
    for (int64_t i = 0; i < rows_; ++i) delta_[i] = 0;
    for (int64_t column = 0; column < columns_.count; column += kRow) {
      const int64_t n = columns_.count - column < kRow ? columns_.count - column : kRow;
      compute_weights(column, n);
      for (int64_t i = 0; i < rows_; ++i) {
        sum[i] += sum_of_row(weights_.data() + i * kRow, n);
        delta_[i] += dot(weights_.data() + i * kRow, dscores_.data() + i * kRow, n);
      }
    }
    for (int64_t i = 0; i < rows_; ++i) {
      if (sum[i] == 0) continue;
      factor_[i] = 1 / sum[i];
      delta_[i] *= factor_[i];
    }
  }

  // The same, with a weight of exactly 1 where it has no other beside it.
  void add_up_one_block() {
    const int64_t n = columns_.count;
    compute_weights(0, n);
    for (int64_t i = 0; i < rows_; ++i) {
      S* const row = weights_.data() + i * kRow;
      const S sum = sum_of_row(row, n);
      delta_[i] = 0;
      if (sum == 0) continue;
      factor_[i] = 1 / sum;
      for (int64_t j = 0; j < n; ++j) row[j] /= sum;
      delta_[i] = dot(row, dscores_.data() + i * kRow, n);
    }
  }

  // Columns [begin, end) at least
  void pack(int64_t begin, int64_t end) {
    if (packed_begin_ <= begin && end <= packed_end_) return;
    keys_.template pack<T>(f_.context_k, f_.k, b_, kv_head_, k_scale_.data(), begin, end);
    values_.template pack<T>(f_.context_v, f_.v, b_, kv_head_, nullptr, begin, end);
    packed_begin_ = begin;
    packed_end_ = end;
  }

  static S sum_of_row(const S* row, int64_t n) {
    RowSum<S> total;
    for_each_vector<S>(n, [&](int64_t i, auto lanes) { total.add(load(row + i, lanes), lanes); });
    return total.total();
  }

  template <typename U>
  static S dot(const U* a, const U* b, int64_t n) {
    RowSum<S> products;
    for_each_vector<S>(
        n, [&](int64_t i, auto lanes) { products.add_product(load(a + i, lanes), load(b + i, lanes), lanes); });
    return products.total();
  }

  const Backward& f_;
  const Columns<S>& columns_;
  WidthScale<S> q_scale_, k_scale_;
  Additions<S> additions_;
  Packed<E> keys_, values_;
  Buffer<E> q_, dout_;
  Buffer<S> weights_, dscores_;
  S lse_[kGradientQueries], factor_[kGradientQueries], delta_[kGradientQueries];
  int64_t b_ = -1, h_ = -1, kv_head_ = -1;
  int64_t packed_begin_ = 0, packed_end_ = 0;
  int64_t first_ = 0, rows_ = 0;
};

}  // namespace imagen_fast::IMAGEN_FAST_ISA::attention
