// channel_rms_norm_act on the CPU. Compiled once per instruction set. x is read from memory once: a few positions at a
// time, whose channels stay in the cache between their norm and what is done with it.
#include "cpu_common.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace channel_rms_norm_act {
namespace {

// Turns the sums of squares of n positions into their rstd. Where a sum has overflowed, exactly(i) gives it in double.
template <typename S, typename Exactly>
IMAGEN_FAST_INLINE void to_rstd(S* values, int64_t n, int64_t channels, Exactly&& exactly) {
  const S root = static_cast<S>(std::sqrt(static_cast<double>(channels)));
  const S largest = std::is_same_v<S, float> ? S(3.4028234663852886e38) : S(1.7976931348623157e308);
  bool overflow = false;
  for (int64_t i = 0; i < n; ++i) overflow |= values[i] > largest;
  if (overflow) {
    for (int64_t i = 0; i < n; ++i) {
      const double norm = std::sqrt(values[i] > largest ? exactly(i) : static_cast<double>(values[i]));
      values[i] = static_cast<S>(root / (norm < kEps ? kEps : norm));
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const S norm = std::sqrt(values[i]);
    values[i] = root / (norm < S(kEps) ? S(kEps) : norm);  // a NaN stays one
  }
}

template <typename T>
double squares_in_double(const T* x, int64_t channels, int64_t stride) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const double value = widen(x[c * stride]);
    sum += value * value;
  }
  return sum;
}

// ---- [batch][channels][positions]

// The positions of one vector, all channels; they are kept in `scratch` in between.
template <typename T, typename Act, typename S, typename Lanes>
IMAGEN_FAST_INLINE void tile(const Forward& f, const T* x, T* y, S* rstd, const S* multiplier, const S* offset,
                             S* scratch, Lanes lanes, int64_t count) {
  using V = typename Lanes::V;
  V squares(S(0));
  for (int64_t first = 0; first < f.channels; first += kChain) {
    const int64_t end = first + kChain < f.channels ? first + kChain : f.channels;
    V part(S(0));
    for (int64_t c = first; c < end; ++c) {
      const V value = load(x + c * f.positions, lanes);
      value.store(scratch + c * V::kWidth);
      part = fma(value, value, part);
    }
    squares = squares + part;
  }
  S values[V::kWidth];
  squares.store(values);
  to_rstd(values, V::kWidth, f.channels, [&](int64_t i) { return squares_in_double(x + i, f.channels, f.positions); });
  for (int64_t i = 0; i < count; ++i) rstd[i] = values[i];
  const V r = V::load(values);
  for (int64_t c = 0; c < f.channels; ++c) {
    const V t = fma(V::load(scratch + c * V::kWidth) * r, V(multiplier[c]), V(offset[c]));
    store(Act::template value<T>(t), y + c * f.positions, lanes);
  }
}

template <typename T, typename Act>
void channels_first(const Forward& f) {
  using S = AccumulateType<T>;
  constexpr int64_t kWidth = Wide<S>::kWidth;
  const int64_t tiles = ceil_div(f.positions, kWidth);  // of a sample
  parallel_for(f.batch * tiles, kWidth * f.channels, [&](int64_t begin, int64_t end) {
    SampleAffine<S> affine(f);
    Buffer<S> scratch(kWidth * f.channels);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t b = k / tiles;
      affine.prepare(b);
      const int64_t first = k % tiles * kWidth;
      const int64_t n = f.positions - first < kWidth ? f.positions - first : kWidth;
      const int64_t at = b * f.channels * f.positions + first;
      for_each_vector<S>(n, [&](int64_t i, auto lanes) {
        const int64_t width = decltype(lanes)::V::kWidth;
        tile<T, Act>(f, static_cast<const T*>(f.x) + at + i, static_cast<T*>(f.y) + at + i,
                     static_cast<S*>(f.rstd) + b * f.positions + first + i, affine.multiplier(), affine.offset(),
                     scratch.data(), lanes, n - i < width ? n - i : width);
      });
    }
  });
}

// ---- [batch][positions][channels]

template <typename T, typename Act>
void channels_last(const Forward& f) {
  using S = AccumulateType<T>;
  constexpr int64_t kRows = 16;  // whose square roots and divisions fill a vector
  parallel_for(f.batch * f.positions, f.channels, [&](int64_t begin, int64_t end) {
    SampleAffine<S> affine(f);
    for (int64_t first = begin; first < end;) {
      const int64_t b = first / f.positions;
      affine.prepare(b);
      int64_t rows = (b + 1) * f.positions - first;
      rows = rows < end - first ? rows : end - first;
      rows = rows < kRows ? rows : kRows;
      const T* x = static_cast<const T*>(f.x) + first * f.channels;
      T* y = static_cast<T*>(f.y) + first * f.channels;
      S rstd[kRows] = {};
      for (int64_t row = 0; row < rows; ++row) {
        RowSum<S> squares;
        for_each_vector<S>(f.channels, [&](int64_t c, auto lanes) {
          const auto value = load(x + row * f.channels + c, lanes);
          squares.add_product(value, value, lanes);
        });
        rstd[row] = squares.total();
      }
      to_rstd(rstd, kRows, f.channels, [&](int64_t i) { return squares_in_double(x + i * f.channels, f.channels, 1); });
      for (int64_t row = 0; row < rows; ++row) {
        static_cast<S*>(f.rstd)[first + row] = rstd[row];
        const S r = rstd[row];
        for_each_vector<S>(f.channels, [&](int64_t c, auto lanes) {
          using V = typename decltype(lanes)::V;
          const V xhat = load(x + row * f.channels + c, lanes) * V(r);
          const V t = fma(xhat, load(affine.multiplier() + c, lanes), load(affine.offset() + c, lanes));
          store(Act::template value<T>(t), y + row * f.channels + c, lanes);
        });
      }
      first += rows;
    }
  });
}

struct Run {
  const Forward& f;

  template <typename T, typename Act>
  void operator()() const {
    f.channels_last ? channels_last<T, Act>(f) : channels_first<T, Act>(f);
  }
};

}  // namespace
}  // namespace channel_rms_norm_act

void channel_rms_norm_act_forward(const imagen_fast::channel_rms_norm_act::Forward& f) {
  dispatch(f, channel_rms_norm_act::Run{f});
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
