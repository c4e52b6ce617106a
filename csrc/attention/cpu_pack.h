// Brings rows of q, k and v into the element type that is multiplied, l2-normalised if asked for, and into the order in
// which cpu_matmul.h reads them. What is packed once is read by every query that attends to it.
#pragma once

#include <cmath>

#include "../common/buffer.h"
#include "cpu_matmul.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA::attention {

using namespace imagen_fast::attention;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// The columns of a score matrix: the context's keys and the own ones, each of the two filled up to whole vectors, so
// that a vector never holds keys of both, and all of them up to `multiple` columns.
template <typename S>
struct Columns {
  struct Segment {
    int64_t column, key, count;  // where it begins, and how many keys it has
    int64_t filled;              // where the next one begins
  };

  explicit Columns(const Problem& p, int64_t multiple = Vec<S>::kWidth)
      : count(round_up(round_up(p.context, Vec<S>::kWidth) + round_up(p.own, Vec<S>::kWidth), multiple)),
        segment{{0, 0, p.context, round_up(p.context, Vec<S>::kWidth)},
                {round_up(p.context, Vec<S>::kWidth), p.context, p.own, count}} {}

  int64_t count;
  Segment segment[2];
};

// (D,) in S; null if absent
template <typename S>
class WidthScale {
 public:
  WidthScale(const Parameter& parameter, int64_t width) : values_(width), present_(parameter.data) {
    for (int64_t i = 0; present_ && i < width; ++i) values_[i] = read(parameter, 0, i, S(1));
  }
  const S* data() { return present_ ? values_.data() : nullptr; }

 private:
  Buffer<S> values_;
  bool present_;
};

constexpr double kSmallestNorm = 1e-12;

template <typename S, typename T>
inline S inverse_norm(const T* from, int64_t width) {
  RowSum<S> squares;
  for_each_vector<S>(width, [&](int64_t i, auto lanes) {
    const auto x = load(from + i, lanes);
    squares.add_product(x, x, lanes);
  });
  const S norm = std::sqrt(squares.total());
  return 1 / (norm < S(kSmallestNorm) ? S(kSmallestNorm) : norm);
}

// `rows` rows, and rows of zeros after them up to `filled`; normalised if there is a `scale`
template <typename E, typename T, typename S>
void load_rows(const T* from, int64_t stride, int64_t rows, int64_t filled, int64_t width, const S* scale, E* to,
               int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += to_stride) {
    if (scale) {
      const S inverse = inverse_norm<S>(from, width);
      for_each_vector<S>(width, [&](int64_t i, auto lanes) {
        using V = typename decltype(lanes)::V;
        store(load(from + i, lanes) * V(inverse) * load(scale + i, lanes), to + i, lanes);
      });
    } else if constexpr (std::is_same_v<E, T>) {
      std::memcpy(to, from, width * sizeof(E));
    } else {
      for_each_vector<S>(width, [&](int64_t i, auto lanes) { store(load(from + i, lanes), to + i, lanes); });
    }
  }
  if (filled > rows) std::memset(static_cast<void*>(to), 0, (filled - rows) * to_stride * sizeof(E));
}

#if defined(__AVX512F__)
// 16 rows of 16 words; both strides in words
IMAGEN_FAST_INLINE void transpose_words(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const int32_t*>(from) + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    // Quarters of the rows i, i + 4, i + 8, i + 12: columns i, 4 + i, 8 + i, 12 + i
    const __m512i low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    int32_t* const out = static_cast<int32_t*>(to) + i * to_stride;
    _mm512_storeu_si512(out, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(out + 4 * to_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(out + 8 * to_stride, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(out + 12 * to_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
}
#endif

// A vector's worth of rows, (kWidth, width), as columns: element (r, d) goes to step d / kTerms, column r.
template <typename E>
void transpose_rows(const E* from, int64_t width, E* to, int64_t step) {
  using S = typename Step<E>::S;
  constexpr int kTerms = Step<E>::kTerms;
  int64_t d = 0;
#if defined(__AVX512F__)
  if constexpr (kTerms * sizeof(E) == sizeof(int32_t)) {
    for (; d + 16 * kTerms <= width; d += 16 * kTerms) {
      transpose_words(from + d, width / kTerms, to + d / kTerms * step, step / kTerms);
    }
  }
#endif
  for (; d < width; d += kTerms) {
    E* const column = to + d / kTerms * step;
    for (int r = 0; r < Vec<S>::kWidth; ++r) std::memcpy(column + r * kTerms, from + r * width + d, kTerms * sizeof(E));
  }
}

// A vector's worth of rows, `stride` apart, as the right side of a product whose sum is over the rows
template <typename E>
void interleave_rows(const E* from, int64_t stride, int64_t width, E* to, int64_t step) {
  using S = typename Step<E>::S;
  for (int r = 0; r < Vec<S>::kWidth; r += Step<E>::kTerms, from += Step<E>::kTerms * stride, to += step) {
    if constexpr (Step<E>::kTerms == 1) {
      std::memcpy(to, from, width * sizeof(E));
    } else {
      for (int64_t d = 0; d < width; ++d) {
        to[2 * d] = from[d];
        to[2 * d + 1] = from[stride + d];
      }
    }
  }
}

// The keys or values of one (sample, head), in up to two orders.
template <typename E>
class Packed {
  using S = typename Step<E>::S;
  static constexpr int kTerms = Step<E>::kTerms;

 public:
  // With zeros in the steps from D to `depth`
  Packed(const Columns<S>& columns, int64_t width, int64_t depth, bool transposed, bool interleaved)
      : columns_(columns),
        width_(width),
        depth_(depth),
        row_(round_up(width, Vec<S>::kWidth)),
        rows_(Vec<S>::kWidth * depth),
        transposed_(transposed ? round_up(columns.count, kTileColumns<S>) * depth : 0),
        interleaved_(interleaved ? columns.count * row_ : 0),
        want_transposed_(transposed),
        want_interleaved_(interleaved) {
    std::memset(static_cast<void*>(rows_.data()), 0, Vec<S>::kWidth * depth * sizeof(E));
    // What lies beyond D in a row is multiplied too, and dropped.
    if (interleaved) std::memset(static_cast<void*>(interleaved_.data()), 0, columns.count * row_ * sizeof(E));
  }

  template <typename T>
  void pack(const HeadRows& context, const HeadRows& own, int64_t b, int64_t h, const S* scale) {
    pack<T>(context, own, b, h, scale, 0, columns_.count);
  }

  // Columns [begin, end) alone, which are whole vectors
  template <typename T>
  void pack(const HeadRows& context, const HeadRows& own, int64_t b, int64_t h, const S* scale, int64_t begin,
            int64_t end) {
    const HeadRows* const sources[] = {&context, &own};
    for (int64_t column = begin; column < end; column += Vec<S>::kWidth) {
      const int s = column < columns_.segment[1].column ? 0 : 1;
      const HeadRows& source = *sources[s];
      const int64_t i = column - columns_.segment[s].column;
      const int64_t rest = columns_.segment[s].count - i;
      const int64_t rows = rest < 0 ? 0 : rest < Vec<S>::kWidth ? rest : Vec<S>::kWidth;
      const T* from =
          static_cast<const T*>(source.data) + b * source.stride_b + h * source.stride_h + i * source.stride_l;
      load_rows(from, source.stride_l, rows, Vec<S>::kWidth, width_, scale, rows_.data(), depth_);
      if (want_transposed_) transpose_rows(rows_.data(), depth_, panel_of(column), kTileColumns<S> * kTerms);
      if (want_interleaved_) {
        interleave_rows(rows_.data(), depth_, width_, interleaved_.data() + column * row_, row_ * kTerms);
      }
    }
  }

  // D steps of keys in columns, from `column` on, which begins a panel
  Right<E> keys_in_columns(int64_t column) { return {panel_of(column), kTileColumns<S> * kTerms}; }
  int64_t panel() const { return kTileColumns<S> * depth_; }

  // Steps over keys from `column` on, D in columns
  Right<E> width_in_columns(int64_t column) { return {interleaved_.data() + column * row_, row_ * kTerms}; }

 private:
  E* panel_of(int64_t column) {
    return transposed_.data() + column / kTileColumns<S> * panel() + column % kTileColumns<S> * kTerms;
  }

  const Columns<S>& columns_;
  const int64_t width_, depth_;
  const int64_t row_;  // D filled up to whole vectors
  Buffer<E> rows_, transposed_, interleaved_;
  const bool want_transposed_, want_interleaved_;
};

}  // namespace imagen_fast::IMAGEN_FAST_ISA::attention
