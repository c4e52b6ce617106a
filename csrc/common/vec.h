// Vec<S>: as many lanes of S (float or double) as one register of this object's instruction set holds. Loads widen
// fp16 and bf16, stores round back to nearest even. Vec<float> is written per instruction set, Vec<double> is generic.
// Wide<S>: several Vec<S>, each operation done on all of them in turn. A function like exp is one long chain of
// dependent instructions; with several chains in step, the machine always has an instruction that can start.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "number_formats.h"

#define IMAGEN_FAST_INLINE inline __attribute__((always_inline))

namespace imagen_fast::IMAGEN_FAST_ISA {

template <typename S>
struct Vec;

// A number as an integer, in whatever form times_power_of_two takes it, and a fraction in [-1/2, 1/2]
template <typename V>
struct Split {
  V fraction;
  V integer;
};

// Stores two of V, one after the other or each where it belongs. Overloaded where one instruction rounds both.
template <typename V, typename T>
IMAGEN_FAST_INLINE void store_two(V a, V b, T* to) {
  a.store(to);
  b.store(to + V::kWidth);
}
template <typename V, typename T>
IMAGEN_FAST_INLINE void store_two(V a, V b, T* to_a, T* to_b) {
  a.store(to_a);
  b.store(to_b);
}

// A number as n + r with |r| <= 1/64, and 2^(n - floor(n)) of that; times_power_of_two takes n as floor(n).
template <typename V>
struct TableOfPowers {
  V power;
  V r;
  V n;
};

// Two of V (a Vec, or Twice itself), in step
template <typename V>
struct Twice {
  using Scalar = typename V::Scalar;
  static constexpr int kVectors = 2 * V::kVectors;
  static constexpr int kWidth = 2 * V::kWidth;

  struct Mask {
    typename V::Mask first, second;
  };

  V first, second;

  Twice() = default;
  // From a number, or from a single Vec
  template <typename U>
  IMAGEN_FAST_INLINE Twice(U value) : first(value), second(value) {}
  IMAGEN_FAST_INLINE Twice(V first, V second) : first(first), second(second) {}

  template <typename T>
  static IMAGEN_FAST_INLINE Twice load(const T* from) {
    return {V::load(from), V::load(from + V::kWidth)};
  }
  template <typename T>
  IMAGEN_FAST_INLINE void store(T* to) const {
    store_two(first, second, to);
  }

  // A vector from each of several rows
  template <typename T>
  static IMAGEN_FAST_INLINE Twice load_rows(const T* from, int64_t stride) {
    return {V::load_rows(from, stride), V::load_rows(from + V::kVectors * stride, stride)};
  }
  template <typename T>
  static IMAGEN_FAST_INLINE Twice load_first_of_rows(const T* from, int64_t stride, int count) {
    return {V::load_first_of_rows(from, stride, count),
            V::load_first_of_rows(from + V::kVectors * stride, stride, count)};
  }
  template <typename T>
  IMAGEN_FAST_INLINE void store_rows(T* to, int64_t stride) const {
    if constexpr (V::kVectors == 1) {
      store_two(first, second, to, to + stride);
    } else {
      first.store_rows(to, stride);
      second.store_rows(to + V::kVectors * stride, stride);
    }
  }
  template <typename T>
  IMAGEN_FAST_INLINE void store_first_of_rows(T* to, int64_t stride, int count) const {
    first.store_first_of_rows(to, stride, count);
    second.store_first_of_rows(to + V::kVectors * stride, stride, count);
  }

  friend IMAGEN_FAST_INLINE Twice operator+(Twice a, Twice b) { return {a.first + b.first, a.second + b.second}; }
  friend IMAGEN_FAST_INLINE Twice operator-(Twice a, Twice b) { return {a.first - b.first, a.second - b.second}; }
  friend IMAGEN_FAST_INLINE Twice operator*(Twice a, Twice b) { return {a.first * b.first, a.second * b.second}; }
  friend IMAGEN_FAST_INLINE Mask operator>=(Twice a, Twice b) { return {a.first >= b.first, a.second >= b.second}; }
  friend IMAGEN_FAST_INLINE Mask operator<(Twice a, Twice b) { return {a.first < b.first, a.second < b.second}; }
  friend IMAGEN_FAST_INLINE Twice fma(Twice a, Twice b, Twice c) {
    return {fma(a.first, b.first, c.first), fma(a.second, b.second, c.second)};
  }
  friend IMAGEN_FAST_INLINE Twice fms(Twice a, Twice b, Twice c) {
    return {fms(a.first, b.first, c.first), fms(a.second, b.second, c.second)};
  }
  friend IMAGEN_FAST_INLINE Twice select(Mask mask, Twice yes, Twice no) {
    return {select(mask.first, yes.first, no.first), select(mask.second, yes.second, no.second)};
  }
  friend IMAGEN_FAST_INLINE Twice min(Twice a, Twice b) { return {min(a.first, b.first), min(a.second, b.second)}; }
  friend IMAGEN_FAST_INLINE Twice max(Twice a, Twice b) { return {max(a.first, b.first), max(a.second, b.second)}; }
  friend IMAGEN_FAST_INLINE Twice abs(Twice a) { return {abs(a.first), abs(a.second)}; }
  friend IMAGEN_FAST_INLINE Twice negative_abs(Twice a) { return {negative_abs(a.first), negative_abs(a.second)}; }
  friend IMAGEN_FAST_INLINE Twice divide(Twice a, Twice b) {
    return {divide(a.first, b.first), divide(a.second, b.second)};
  }
  friend IMAGEN_FAST_INLINE Twice divide_roughly(Twice a, Twice b) {
    return {divide_roughly(a.first, b.first), divide_roughly(a.second, b.second)};
  }
  friend IMAGEN_FAST_INLINE Twice multiply_where(Mask mask, Twice a, Twice b) {
    return {multiply_where(mask.first, a.first, b.first), multiply_where(mask.second, a.second, b.second)};
  }
  friend IMAGEN_FAST_INLINE Split<Twice> split_product(Twice a, Twice b) {
    const auto first = split_product(a.first, b.first), second = split_product(a.second, b.second);
    return {{first.fraction, second.fraction}, {first.integer, second.integer}};
  }
  friend IMAGEN_FAST_INLINE TableOfPowers<Twice> table_of_powers(Twice a) {
    const auto first = table_of_powers(a.first), second = table_of_powers(a.second);
    return {{first.power, second.power}, {first.r, second.r}, {first.n, second.n}};
  }
  friend IMAGEN_FAST_INLINE Twice times_power_of_two(Twice a, Twice n) {
    return {times_power_of_two(a.first, n.first), times_power_of_two(a.second, n.second)};
  }
  friend IMAGEN_FAST_INLINE Scalar sum(Twice a) { return sum(a.first + a.second); }
  friend IMAGEN_FAST_INLINE Scalar largest(Twice a) { return largest(max(a.first, a.second)); }
  // The sum of the vectors of a * b, and c
  template <typename U>
  friend IMAGEN_FAST_INLINE U add_products(Twice a, Twice b, U c) {
    return add_products(a.second, b.second, add_products(a.first, b.first, c));
  }
  friend IMAGEN_FAST_INLINE auto sum_of_vectors(Twice a) { return sum_of_vectors(a.first + a.second); }

  template <typename Function>
  friend IMAGEN_FAST_INLINE Twice map(Twice a, Function function) {
    return {map(a.first, function), map(a.second, function)};
  }
};

// Whether times_power_of_two gives infinity where the result is too large, and divide_roughly divides by that, as
// divide does, to 0 (or NaN, infinity by infinity).
template <typename V>
constexpr bool kOverflowsToInfinity = false;
template <typename V>
constexpr bool kOverflowsToInfinity<Twice<V>> = kOverflowsToInfinity<V>;

// Whether there is table_of_powers
template <typename V>
constexpr bool kHasTableOfPowers = false;
template <typename V>
constexpr bool kHasTableOfPowers<Twice<V>> = kHasTableOfPowers<V>;

}  // namespace imagen_fast::IMAGEN_FAST_ISA

#include "vec_generic.h"

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#endif

namespace imagen_fast::IMAGEN_FAST_ISA {

template <typename S>
struct WideOf {
  using type = Twice<Vec<S>>;
};
#if defined(__AVX512F__)  // which has 32 registers, the others 16
template <>
struct WideOf<float> {
  using type = Twice<Twice<Vec<float>>>;
};
#endif
template <typename S>
using Wide = typename WideOf<S>::type;

// Which part of a row a load or a store concerns: a whole Wide, or the first lanes of a Vec at the row's end.
template <typename S>
struct WholeWide {
  using V = Wide<S>;
};
template <typename S>
struct FirstLanes {
  using V = Vec<S>;
  int count;
};

// Calls body(offset, lanes) for all of a row of n elements.
template <typename S, typename Body>
IMAGEN_FAST_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + Wide<S>::kWidth <= n; i += Wide<S>::kWidth) body(i, WholeWide<S>{});
  for (; i < n; i += Vec<S>::kWidth) {
    body(i, FirstLanes<S>{static_cast<int>(n - i < Vec<S>::kWidth ? n - i : Vec<S>::kWidth)});
  }
}

template <typename S, typename T>
IMAGEN_FAST_INLINE Wide<S> load(const T* from, WholeWide<S>) {
  return Wide<S>::load(from);
}
// Zero in the other lanes
template <typename S, typename T>
IMAGEN_FAST_INLINE Vec<S> load(const T* from, FirstLanes<S> lanes) {
  return Vec<S>::load_first(from, lanes.count);
}

template <typename S, typename T>
IMAGEN_FAST_INLINE void store(Wide<S> value, T* to, WholeWide<S>) {
  value.store(to);
}
template <typename S, typename T>
IMAGEN_FAST_INLINE void store(Vec<S> value, T* to, FirstLanes<S> lanes) {
  value.store_first(to, lanes.count);
}

// The same for one vector of columns in several successive rows, a Vec of a Wide from each. Where a body takes both:
// load_column gives what all rows share, add_to_column sums over the rows.
template <typename S>
struct Rows {
  using V = Wide<S>;
  static constexpr int kCount = Wide<S>::kVectors;
  int64_t stride;
};
template <typename S>
struct FirstLanesOfRows {
  using V = Wide<S>;
  int64_t stride;
  int count;
};

// Calls body(offset, column, lanes) for all of n elements in rows of `width`, of which the last may be short.
template <typename S, typename Body>
IMAGEN_FAST_INLINE void for_each_column_vector(int64_t n, int64_t width, Body&& body) {
  int64_t i = 0;
  for (; i + Rows<S>::kCount * width <= n; i += Rows<S>::kCount * width) {
    int64_t c = 0;
    for (; c + Vec<S>::kWidth <= width; c += Vec<S>::kWidth) body(i + c, c, Rows<S>{width});
    if (c < width) body(i + c, c, FirstLanesOfRows<S>{width, static_cast<int>(width - c)});
  }
  for (; i < n; i += width) {
    const int64_t end = n - i < width ? n - i : width;
    for (int64_t c = 0; c < end; c += Vec<S>::kWidth) {
      body(i + c, c, FirstLanes<S>{static_cast<int>(end - c < Vec<S>::kWidth ? end - c : Vec<S>::kWidth)});
    }
  }
}

template <typename S, typename T>
IMAGEN_FAST_INLINE Wide<S> load(const T* from, Rows<S> rows) {
  return Wide<S>::load_rows(from, rows.stride);
}
template <typename S, typename T>
IMAGEN_FAST_INLINE Wide<S> load(const T* from, FirstLanesOfRows<S> rows) {
  return Wide<S>::load_first_of_rows(from, rows.stride, rows.count);
}

template <typename S, typename T>
IMAGEN_FAST_INLINE void store(Wide<S> value, T* to, Rows<S> rows) {
  value.store_rows(to, rows.stride);
}
template <typename S, typename T>
IMAGEN_FAST_INLINE void store(Wide<S> value, T* to, FirstLanesOfRows<S> rows) {
  value.store_first_of_rows(to, rows.stride, rows.count);
}

template <typename S>
IMAGEN_FAST_INLINE Vec<S> load_column(const S* from, Rows<S>) {
  return Vec<S>::load(from);
}
template <typename S, typename Lanes>
IMAGEN_FAST_INLINE Vec<S> load_column(const S* from, Lanes lanes) {
  return Vec<S>::load_first(from, lanes.count);
}

template <typename S>
IMAGEN_FAST_INLINE void add_product_to_column(Wide<S> a, Wide<S> b, S* to, Rows<S>) {
  add_products(a, b, Vec<S>::load(to)).store(to);
}
template <typename S, typename V, typename Lanes>
IMAGEN_FAST_INLINE void add_product_to_column(V a, V b, S* to, Lanes lanes) {
  add_products(a, b, Vec<S>::load_first(to, lanes.count)).store_first(to, lanes.count);
}

template <typename S>
IMAGEN_FAST_INLINE void add_to_column(Wide<S> value, S* to, Rows<S>) {
  (Vec<S>::load(to) + sum_of_vectors(value)).store(to);
}
template <typename S, typename V, typename Lanes>
IMAGEN_FAST_INLINE void add_to_column(V value, S* to, Lanes lanes) {
  (Vec<S>::load_first(to, lanes.count) + sum_of_vectors(value)).store_first(to, lanes.count);
}

// A sum over a row, of terms that come as Wide and, at its end, as Vec
template <typename S>
class RowSum {
 public:
  IMAGEN_FAST_INLINE void add(Wide<S> term, WholeWide<S>) { wide_ = wide_ + term; }
  IMAGEN_FAST_INLINE void add(Vec<S> term, FirstLanes<S> lanes) { rest_ = rest_ + keep_first(term, lanes.count); }
  IMAGEN_FAST_INLINE void add_product(Wide<S> a, Wide<S> b, WholeWide<S>) { wide_ = fma(a, b, wide_); }
  IMAGEN_FAST_INLINE void add_product(Vec<S> a, Vec<S> b, FirstLanes<S> lanes) {
    rest_ = fma(keep_first(a, lanes.count), b, rest_);
  }

  IMAGEN_FAST_INLINE S total() const { return sum(sum_of_vectors(wide_) + rest_); }

 private:
  Wide<S> wide_{S(0)};
  Vec<S> rest_{S(0)};
};

}  // namespace imagen_fast::IMAGEN_FAST_ISA
