// What is added to the scores, and their softmax.
#pragma once

#include "../common/vec_math.h"
#include "cpu_pack.h"

namespace imagen_fast::IMAGEN_FAST_ISA::attention {

template <typename S>
constexpr S kInfinity = S(__builtin_inf());

// row[i] += from[i]
template <typename S, typename T>
IMAGEN_FAST_INLINE void add_row(const T* from, int64_t n, S* row) {
  for_each_vector<S>(
      n, [&](int64_t i, auto lanes) { store(load(row + i, lanes) + load(from + i, lanes), row + i, lanes); });
}

template <typename S>
IMAGEN_FAST_INLINE void add_constant(S value, int64_t n, S* row) {
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    store(load(row + i, lanes) + V(value), row + i, lanes);
  });
}

// body(own, at, key, count) for the keys of each segment among the columns [first, first + n): the first of them, as a
// column counted from `first` and as a key.
template <typename S, typename Body>
IMAGEN_FAST_INLINE void for_each_segment(const Columns<S>& columns, int64_t first, int64_t n, Body&& body) {
  for (int s = 0; s < 2; ++s) {
    const auto& segment = columns.segment[s];
    const int64_t begin = first > segment.column ? first : segment.column;
    const int64_t segment_end = segment.column + segment.count;
    const int64_t end = first + n < segment_end ? first + n : segment_end;
    if (begin < end) body(s == 1, begin - first, begin - segment.column + segment.key, end - begin);
  }
}

// Where the diagonal of query i and a key, an own one, stands among those of a head
inline int64_t diagonal(const Problem& p, int64_t i, int64_t key) { return p.queries - 1 - i + key - p.context; }

// The biases of a (sample, query head), in any of their forms, and the key mask.
template <typename S>
class Additions {
 public:
  Additions(const Problem& p, const Columns<S>& columns)
      : p_(p), columns_(columns), masked_(columns.count), diagonals_(p.relative.data ? p.queries + p.own : 0) {}

  void start_sample(int64_t b) {
    b_ = b;
    const bool* const mask = p_.key_mask ? p_.key_mask + b * p_.key_mask_stride : nullptr;
    for (int64_t c = 0; c < columns_.count; ++c) masked_[c] = -kInfinity<S>;
    for (const auto& segment : columns_.segment) {
      for (int64_t j = 0; j < segment.count; ++j) {
        if (!mask || mask[segment.key + j]) masked_[segment.column + j] = 0;
      }
    }
  }

  void start_head(int64_t h) {
    h_ = h;
    if (!p_.relative.data) return;
    const Parameter table{p_.relative.data, p_.relative.dtype, p_.q_heads, 1};
    const int64_t diagonals = p_.queries + p_.own - 1;
    for (int64_t i = 0; i < diagonals; ++i) diagonals_[i] = read(table, p_.relative.bucket[i], h, S(0));
  }

  // To the scores of query i with the columns [first, first + n); with -inf where there is no key
  IMAGEN_FAST_INLINE void add(int64_t i, int64_t first, int64_t n, S* row) {
    if (p_.bias.data || p_.relative.data) add_biases(i, first, n, row);
    if (has_masked(first, n)) add_row(masked_.data() + first, n, row);
  }

 private:
  // Whether there is a masked key, or a column without one
  bool has_masked(int64_t first, int64_t n) const {
    if (p_.key_mask) return true;
    for (const auto& segment : columns_.segment) {
      const int64_t end = segment.column + segment.count;
      if (end < segment.filled && segment.filled > first && end < first + n) return true;
    }
    return false;
  }

  void add_biases(int64_t i, int64_t first, int64_t n, S* row) {
    for_each_segment(columns_, first, n, [&](bool own, int64_t at, int64_t key, int64_t count) {
      if (p_.bias.data) add_bias(i, key, count, row + at);
      if (p_.relative.data && own) add_row(diagonals_.data() + diagonal(p_, i, key), count, row + at);
    });
  }

  void add_bias(int64_t i, int64_t key, int64_t n, S* row) {
    const Bias& bias = p_.bias;
    const int64_t offset = b_ * bias.stride_b + h_ * bias.stride_h + i * bias.stride_i;
    if (bias.stride_j == 0) return add_constant(read(Parameter{bias.data, bias.dtype, 1, 0}, offset, 0, S(0)), n, row);
    if constexpr (std::is_same_v<S, double>) {
      add_row(static_cast<const double*>(bias.data) + offset + key, n, row);
    } else {
      switch (bias.dtype) {
        case DType::kHalf: return add_row(static_cast<const Half*>(bias.data) + offset + key, n, row);
        case DType::kBFloat16: return add_row(static_cast<const BFloat16*>(bias.data) + offset + key, n, row);
        default: return add_row(static_cast<const float*>(bias.data) + offset + key, n, row);
      }
    }
  }

  const Problem& p_;
  const Columns<S>& columns_;
  Buffer<S> masked_;     // 0 or, where a column is not attended to, -inf
  Buffer<S> diagonals_;  // the relative bias of the head
  int64_t b_ = 0;
  int64_t h_ = 0;
};

// n is a multiple of a vector's width. NaN may be passed over: its exponential is NaN whatever the largest is.
template <typename S>
IMAGEN_FAST_INLINE S largest(const S* row, int64_t n) {
  Wide<S> wide(-kInfinity<S>);
  Vec<S> rest(-kInfinity<S>);
  int64_t i = 0;
  for (; i + Wide<S>::kWidth <= n; i += Wide<S>::kWidth) wide = max(wide, Wide<S>::load(row + i));
  for (; i < n; i += Vec<S>::kWidth) rest = max(rest, Vec<S>::load(row + i));
  const S most = largest(wide), most_of_rest = largest(rest);
  return most > most_of_rest ? most : most_of_rest;
}

// exp(v) for v that is not above 0 but for rounding; NaN stays NaN
template <typename T, typename V>
IMAGEN_FAST_INLINE V exp_score(V v) {
  const V e = exp_nonpositive<T>(v);
#if defined(__AVX512F__)
  return e;
#else
  // What stands in for an instruction there gives 0 for NaN.
  return fma(max(V(-1), v), V(0), e);
#endif
}

// to[i] = exp(row[i] - most), to be summed up by another; returns the sum of what was not yet rounded. `to` may begin
// where `row` does.
template <typename T, typename E, typename S>
IMAGEN_FAST_INLINE S exponentials(const S* row, S most, int64_t n, E* to) {
  Wide<S> wide_sum(S(0));
  Vec<S> sum_of_rest(S(0));
  int64_t i = 0;
  for (; i + Wide<S>::kWidth <= n; i += Wide<S>::kWidth) {
    const Wide<S> e = exp_score<T>(Wide<S>::load(row + i) - Wide<S>(most));
    e.store(to + i);
    wide_sum = wide_sum + e;
  }
  for (; i < n; i += Vec<S>::kWidth) {
    const Vec<S> e = exp_score<T>(Vec<S>::load(row + i) - Vec<S>(most));
    e.store(to + i);
    sum_of_rest = sum_of_rest + e;
  }
  return sum(wide_sum) + sum(sum_of_rest);
}

template <typename S>
IMAGEN_FAST_INLINE void multiply_row(S* row, S by, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec<S>::kWidth) (Vec<S>::load(row + i) * Vec<S>(by)).store(row + i);
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA::attention
