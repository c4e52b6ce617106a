// Sums of bf16 values and of their squares by the dot product of pairs, where the instruction set has it: products are
// exact, sums in float. It takes a register of 32 values as they are in memory.
#pragma once

#include "../common/vec.h"

namespace imagen_fast::IMAGEN_FAST_ISA::group_norm_act {

template <typename T>
constexpr bool kSumsPairs = false;

#ifdef __AVX512BF16__

template <>
constexpr bool kSumsPairs<BFloat16> = true;

class PairSums {
 public:
  static constexpr int64_t kWidth = 32;

  PairSums() = default;
  // From the sums of 16 pairs of columns, of which the first `pairs` are there
  PairSums(const float* sum, const float* squares, int pairs)
      : sum_(_mm512_maskz_loadu_ps(first_mask(pairs), sum)),
        squares_(_mm512_maskz_loadu_ps(first_mask(pairs), squares)) {}

  // Of the first `count` of 32 values; the others may not be there.
  static IMAGEN_FAST_INLINE __m512i load(const BFloat16* x, int64_t count) {
    const auto mask = static_cast<__mmask32>(count < kWidth ? (1u << count) - 1 : ~0u);
    return _mm512_maskz_loadu_epi16(mask, x);
  }
  IMAGEN_FAST_INLINE void add(__m512i x) {
    const auto ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    sum_ = _mm512_dpbf16_ps(sum_, (__m512bh)x, ones);
    squares_ = _mm512_dpbf16_ps(squares_, (__m512bh)x, (__m512bh)x);
  }
  IMAGEN_FAST_INLINE void add(const PairSums& other) {
    sum_ = _mm512_add_ps(sum_, other.sum_);
    squares_ = _mm512_add_ps(squares_, other.squares_);
  }
  void store(float* sum, float* squares, int pairs) const {
    _mm512_mask_storeu_ps(sum, first_mask(pairs), sum_);
    _mm512_mask_storeu_ps(squares, first_mask(pairs), squares_);
  }
  float sum() const { return _mm512_reduce_add_ps(sum_); }
  float squares() const { return _mm512_reduce_add_ps(squares_); }

 private:
  __m512 sum_ = _mm512_setzero_ps();
  __m512 squares_ = _mm512_setzero_ps();
};

struct SumAndSquares {
  float sum;
  float squares;
};

inline SumAndSquares row_pair_sums(const BFloat16* x, int64_t n) {
  constexpr int64_t kWidth = PairSums::kWidth;
  PairSums chains[4];  // the machine begins an addition before the last one has ended
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) chains[k].add(_mm512_loadu_si512(x + i + k * kWidth));
  }
  for (; i < n; i += kWidth) chains[0].add(PairSums::load(x + i, n - i));
  chains[0].add(chains[1]);
  chains[2].add(chains[3]);
  chains[0].add(chains[2]);
  return {chains[0].sum(), chains[0].squares()};
}

// sums[k], squares[k] of columns 2k and 2k + 1 over n elements in rows of `width`, which is even; the last row may be
// short.
inline void column_pair_sums(const BFloat16* x, int64_t n, int64_t width, float* sums, float* squares) {
  constexpr int64_t kWidth = PairSums::kWidth;
  constexpr int64_t kRows = 8;
  for (int64_t k = 0; k < width / 2; ++k) sums[k] = squares[k] = 0;
  const auto add_rows = [&](int64_t first, int64_t rows, int64_t end) {
    for (int64_t c = 0; c < end; c += kWidth) {
      const int64_t count = end - c < kWidth ? end - c : kWidth;
      const int pairs = static_cast<int>(count / 2);
      PairSums total(sums + c / 2, squares + c / 2, pairs);
      for (int64_t r = 0; r < rows; ++r) total.add(PairSums::load(x + first + r * width + c, count));
      total.store(sums + c / 2, squares + c / 2, pairs);
    }
  };
  int64_t i = 0;
  for (; i + kRows * width <= n; i += kRows * width) add_rows(i, kRows, width);
  for (; i < n; i += width) add_rows(i, 1, n - i < width ? n - i : width);
}

#endif

}  // namespace imagen_fast::IMAGEN_FAST_ISA::group_norm_act
