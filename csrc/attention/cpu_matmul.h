// The matrix products that attention is made of, in tiles that stay in registers.
//
// C (rows, columns) = A B or C + A B. A is read element by element and broadcast, B and C in whole vectors: columns lie
// in the lanes. The elements E of A and B are float, double or pairs of bf16: two successive terms of the sum beside
// each other, which one instruction multiplies and adds up in float.
#pragma once

#include "../common/vec.h"

namespace imagen_fast::IMAGEN_FAST_ISA::attention {

// A term of the sum, or a pair of them: kTerms elements of E make a step.
template <typename E>
struct Step {
  using S = E;
  static constexpr int kTerms = 1;
  using Operand = Vec<S>;
  static IMAGEN_FAST_INLINE Operand load(const E* from) { return Vec<S>::load(from); }
  static IMAGEN_FAST_INLINE Operand broadcast(const E* from) { return Vec<S>(*from); }
  static IMAGEN_FAST_INLINE Vec<S> multiply_add(Operand a, Operand b, Vec<S> c) { return fma(a, b, c); }
};

// The E as which tensors of T are multiplied
template <typename T>
struct FactorTypeOf {
  using type = AccumulateType<T>;
};
template <typename T>
using FactorType = typename FactorTypeOf<T>::type;

#ifdef __AVX512BF16__
template <>
struct FactorTypeOf<BFloat16> {
  using type = BFloat16;
};

template <>
struct Step<BFloat16> {
  using S = float;
  static constexpr int kTerms = 2;
  using Operand = __m512i;
  static IMAGEN_FAST_INLINE Operand load(const BFloat16* from) { return _mm512_loadu_si512(from); }
  static IMAGEN_FAST_INLINE Operand broadcast(const BFloat16* from) {
    return _mm512_set1_epi32(bit_cast<int32_t>(*reinterpret_cast<const Pair*>(from)));
  }
  static IMAGEN_FAST_INLINE Vec<S> multiply_add(Operand a, Operand b, Vec<S> c) {
    return Vec<S>(_mm512_dpbf16_ps(c.raw, (__m512bh)a, (__m512bh)b));
  }

 private:
  struct Pair {
    BFloat16 first, second;
  };
};
#endif

// The largest tile: with the operands of a step it fills the registers, 32 or 16.
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

template <typename S>
constexpr int64_t kTileColumns = kTileVectors * Vec<S>::kWidth;

// Where the elements of a matrix lie. `step` is from one step of the sum to the next, `other` from one row of A.
template <typename E>
struct Left {
  const E* data;
  int64_t row;
  int64_t step;
};

// Columns are adjacent: kTerms elements each.
template <typename E>
struct Right {
  const E* data;
  int64_t step;
};

template <typename S>
struct Result {
  S* data;
  int64_t row;
};

enum class Store {
  kScaled,  // C = scale A B
  kAdded,   // C = C + A B, terms added to C one after another
  kSummed,  // C = C + A B, terms added to each other first
};

template <typename E, Store kStore, int kRows, int kVectors>
void multiply_tile(Left<E> a, Right<E> b, Result<typename Step<E>::S> c, int64_t steps, typename Step<E>::S scale) {
  using S = typename Step<E>::S;
  using V = Vec<S>;
  V sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = kStore == Store::kAdded ? V::load(c.data + i * c.row + j * V::kWidth) : V(S(0));
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    typename Step<E>::Operand right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = Step<E>::load(b.data + j * V::kWidth * Step<E>::kTerms);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const auto left = Step<E>::broadcast(a.data + i * a.row);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = Step<E>::multiply_add(left, right[j], sum[i][j]);
    }
    a.data += a.step;
    b.data += b.step;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      S* const to = c.data + i * c.row + j * V::kWidth;
      V value = sum[i][j];
      if constexpr (kStore == Store::kScaled) value = value * V(scale);
      if constexpr (kStore == Store::kSummed) value = V::load(to) + value;
      value.store(to);
    }
  }
}

template <typename E, Store kStore, int kVectors>
void multiply_columns(Left<E> a, Right<E> b, Result<typename Step<E>::S> c, int64_t rows, int64_t steps,
                      typename Step<E>::S scale) {
  for (; rows >= kTileRows; rows -= kTileRows) {
    multiply_tile<E, kStore, kTileRows, kVectors>(a, b, c, steps, scale);
    a.data += kTileRows * a.row;
    c.data += kTileRows * c.row;
  }
  switch (rows) {
    case 1: return multiply_tile<E, kStore, 1, kVectors>(a, b, c, steps, scale);
    case 2: return multiply_tile<E, kStore, 2, kVectors>(a, b, c, steps, scale);
    case 3: return multiply_tile<E, kStore, 3, kVectors>(a, b, c, steps, scale);
    case 4: return multiply_tile<E, kStore, 4, kVectors>(a, b, c, steps, scale);
    case 5: return multiply_tile<E, kStore, 5, kVectors>(a, b, c, steps, scale);
    default: return;
  }
}

// C = scale A B, or C + A B (see Store). `panel` is from one kTileColumns of B to the next. Columns of B and C are
// there up to the end of a vector.
template <typename E, Store kStore>
void multiply(Left<E> a, Right<E> b, int64_t panel, Result<typename Step<E>::S> c, int64_t rows, int64_t columns,
              int64_t steps, typename Step<E>::S scale = 1) {
  using S = typename Step<E>::S;
  int64_t vectors = (columns + Vec<S>::kWidth - 1) / Vec<S>::kWidth;
  for (; vectors >= kTileVectors; vectors -= kTileVectors) {
    multiply_columns<E, kStore, kTileVectors>(a, b, c, rows, steps, scale);
    b.data += panel;
    c.data += kTileColumns<S>;
  }
  switch (vectors) {
    case 1: return multiply_columns<E, kStore, 1>(a, b, c, rows, steps, scale);
#if defined(__AVX512F__)
    case 2: return multiply_columns<E, kStore, 2>(a, b, c, rows, steps, scale);
    case 3: return multiply_columns<E, kStore, 3>(a, b, c, rows, steps, scale);
#endif
    default: return;
  }
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA::attention
