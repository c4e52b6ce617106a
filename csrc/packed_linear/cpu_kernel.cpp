// The product on a packed weight. A tile of 6 rows and a panel's 64 columns stays in registers over the whole sum: a
// step reads the panel in four vectors, and broadcasts a pair of terms of each row. A panel is read from the second
// cache by all rows of x before the next one, whose way there from memory begins meanwhile.
#include <algorithm>

#include "../common/parallel.h"
#include "../common/vec.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA {

using namespace imagen_fast::packed_linear;

namespace {

constexpr int kTileRows = 6;
constexpr int64_t kChunkRows = 8 * kTileRows;  // of a task
constexpr int kVectors = 4;
constexpr int kWidth = kPanel / kVectors;  // of a vector of floats, whatever the instruction set has
constexpr int64_t kCacheLine = 64;         // bytes

// Rows of x, and those that continue them
struct Rows {
  const BFloat16* x[kTileRows];
  const BFloat16* more[kTileRows];
  int64_t pairs;  // of terms
  int64_t more_pairs;
};

// What a panel's results meet on their way out: 64 columns of each, of which the first `count` are there.
struct Ends {
  const BFloat16* bias;
  const BFloat16* add[kTileRows];
  BFloat16* y[kTileRows];
  int64_t count;
};

// A stretch of memory to be brought into the second cache, a line every few steps
struct Ahead {
  const char* from;
  int64_t bytes;
};

#ifdef __AVX512BF16__

inline __mmask16 lanes(int64_t count) {
  return count >= kWidth ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
}

inline __m512 load(const BFloat16* from, __mmask16 mask) { return bf16_to_float(_mm256_maskz_loadu_epi16(mask, from)); }

template <int kRows>
void multiply_tile(const Rows& rows, const BFloat16* panel, Ahead ahead, const Ends& ends) {
  constexpr int64_t kStepsPerLine = 8;
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  const auto add_products = [&](const BFloat16* const* x, int64_t pairs) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      __m512bh right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[j] = (__m512bh)_mm512_loadu_si512(panel + 2 * kWidth * j);
      panel += 2 * kPanel;
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        int32_t terms;
        std::memcpy(&terms, x[i] + 2 * pair, sizeof(terms));
        const auto left = (__m512bh)_mm512_set1_epi32(terms);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
      }
      if (pair % kStepsPerLine == 0 && ahead.bytes > 0) {
        _mm_prefetch(ahead.from, _MM_HINT_T1);
        ahead.from += kCacheLine;
        ahead.bytes -= kCacheLine;
      }
    }
  };
  add_products(rows.x, rows.pairs);
  if (rows.more_pairs > 0) add_products(rows.more, rows.more_pairs);
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const __mmask16 mask = lanes(ends.count - j * kWidth);
    const __m512 bias = ends.bias ? load(ends.bias + j * kWidth, mask) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      __m512 value = _mm512_add_ps(sum[i][j], bias);
      if (ends.add[i]) value = _mm512_add_ps(value, load(ends.add[i] + j * kWidth, mask));
      _mm256_mask_storeu_epi16(ends.y[i] + j * kWidth, mask, float_to_bf16(value));
    }
  }
}

#else

// Without the instruction there is no gain, but the same weight gives the same result.
template <int kRows>
void multiply_tile(const Rows& rows, const BFloat16* panel, Ahead, const Ends& ends) {
  for (int i = 0; i < kRows; ++i) {
    float sum[kPanel] = {};
    for (int64_t pair = 0; pair < rows.pairs + rows.more_pairs; ++pair) {
      const BFloat16* terms = pair < rows.pairs ? rows.x[i] + 2 * pair : rows.more[i] + 2 * (pair - rows.pairs);
      const float first = widen(terms[0]), second = widen(terms[1]);
      const BFloat16* right = panel + 2 * kPanel * pair;
      for (int64_t j = 0; j < kPanel; ++j) sum[j] += first * widen(right[2 * j]) + second * widen(right[2 * j + 1]);
    }
    for (int64_t j = 0; j < ends.count; ++j) {
      float value = sum[j];
      if (ends.bias) value += widen(ends.bias[j]);
      if (ends.add[i]) value += widen(ends.add[i][j]);
      narrow(value, &ends.y[i][j]);
    }
  }
}

#endif

void multiply_rows(const Forward& f, int64_t panel, int64_t begin, int64_t end, Ahead ahead) {
  const int64_t column = panel * kPanel;
  const BFloat16* packed = f.packed + panel * kPanel * (f.terms + f.more_terms);
  const int64_t tiles = ceil_div(end - begin, kTileRows);
  const int64_t share = ceil_div(ceil_div(ahead.bytes, kCacheLine), tiles) * kCacheLine;
  for (int64_t r = begin; r < end; r += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, end - r));
    Rows rows{{}, {}, f.terms / 2, f.more_terms / 2};
    Ends ends{f.bias ? f.bias + column : nullptr, {}, {}, std::min(kPanel, f.columns - column)};
    for (int i = 0; i < count; ++i) {
      rows.x[i] = row<BFloat16>(f.x, r + i, f.inner);
      rows.more[i] = f.more_terms > 0 ? row<BFloat16>(f.more, r + i, f.inner) : nullptr;
      ends.add[i] = f.add.data ? row<BFloat16>(f.add, r + i, f.inner) + column : nullptr;
      ends.y[i] = row<BFloat16>(f.y, r + i, f.inner) + column;
    }
    const Ahead next{ahead.from, std::min(share, ahead.bytes)};
    ahead.from += next.bytes;
    ahead.bytes -= next.bytes;
    switch (count) {
      case 1: multiply_tile<1>(rows, packed, next, ends); break;
      case 2: multiply_tile<2>(rows, packed, next, ends); break;
      case 3: multiply_tile<3>(rows, packed, next, ends); break;
      case 4: multiply_tile<4>(rows, packed, next, ends); break;
      case 5: multiply_tile<5>(rows, packed, next, ends); break;
      default: multiply_tile<6>(rows, packed, next, ends);
    }
  }
}

}  // namespace

void packed_linear_pack(const Pack& p) {
  parallel_for(ceil_div(p.columns, kPanel), kPanel * p.terms, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      BFloat16* packed = p.packed + panel * kPanel * p.terms;
      for (int64_t j = 0; j < kPanel; ++j) {
        const int64_t column = panel * kPanel + j;
        const BFloat16* from = p.weight + column * p.stride;
        for (int64_t term = 0; term < p.terms; ++term) {
          packed[term / 2 * 2 * kPanel + 2 * j + term % 2] = column < p.columns ? from[term] : BFloat16{0};
        }
      }
    }
  });
}

void packed_linear_forward(const Forward& f) {
  const int64_t rows = f.outer * f.inner;
  const int64_t panels = ceil_div(f.columns, kPanel), chunks = ceil_div(rows, kChunkRows);
  // Panel by panel; a thread's range may begin and end within one.
  parallel_for(panels * chunks, kPanel * kChunkRows, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t panel = begin / chunks, first = begin % chunks;
      const int64_t last = std::min(chunks, first + end - begin);
      const int64_t bytes = 2 * kPanel * (f.terms + f.more_terms);
      const char* next = reinterpret_cast<const char*>(f.packed) + (panel + 1) * bytes;
      const bool goes_on = begin + last - first < end;
      multiply_rows(f, panel, first * kChunkRows, std::min(rows, last * kChunkRows), {next, goes_on ? bytes : 0});
      begin += last - first;
    }
  });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
