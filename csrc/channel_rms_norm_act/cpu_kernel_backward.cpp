// The gradient of channel_rms_norm_act on the CPU. Compiled once per instruction set.
//
// With t = xhat * multiplier + offset the activation's argument, dt = dy * act'(t) is recomputed from x and rstd. With
// g = dt * multiplier and p = sum(g * xhat) / C over the channels of a position,
//   dx = rstd * (g - xhat * p)
// where p is 0 if the norm was below its lower bound. Per (sample, channel), sum(dt) and sum(dt * xhat) over positions
// are what the gradients of the parameters are made of (../common/parameters.h): over blocks of positions in float, and
// over blocks in double. Blocks depend on the shape alone, so that sums do not depend on the number of threads.
#include "cpu_common.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace channel_rms_norm_act {
namespace {

// What dx = factor * (g - xhat * mean) of a position takes
template <typename S>
struct Terms {
  S factor;
  S mean;
};

template <typename S>
class Position {
 public:
  explicit Position(int64_t channels)
      : largest_(static_cast<S>(std::sqrt(static_cast<double>(channels))) / S(kEps)), channels_(channels) {}

  // From sum(g * xhat)
  Terms<S> terms(S rstd, S sum) const {
    if (rstd >= largest_) return {rstd, S(0)};  // the norm was below its lower bound
    // A single channel is its own norm: the gradient is 0, and not what rounding leaves.
    return {channels_ == 1 ? S(0) : rstd, sum / static_cast<S>(channels_)};
  }

 private:
  const S largest_;
  const int64_t channels_;
};

// Positions of a sample in blocks of about `elements`, and of a multiple of `unit` positions, at most `most` of them
struct Blocks {
  Blocks(const NormProblem& problem, int64_t unit, int64_t most) : positions(problem.positions) {
    size = ceil_div(32768 / problem.channels, unit) * unit;
    size = size < unit ? unit : size > most ? most : size;
    per_sample = ceil_div(positions, size);
  }

  int64_t positions;
  int64_t size;
  int64_t per_sample;
};

// What a kernel is given for one block of a sample: n positions at `first`, counted through all samples
template <typename T>
struct Block {
  using S = AccumulateType<T>;

  const T* dy;
  const T* x;
  T* dx;  // null if it is not asked for
  const S* rstd;
  int64_t n;
  const S* multiplier;
  const S* offset;
  S* sums;  // dt and dt * xhat, [2][channels]
};

IMAGEN_FAST_INLINE auto keep(Wide<float> value, WholeWide<float>) { return value; }
IMAGEN_FAST_INLINE auto keep(Wide<double> value, WholeWide<double>) { return value; }
template <typename S>
IMAGEN_FAST_INLINE Vec<S> keep(Vec<S> value, FirstLanes<S> lanes) {
  return keep_first(value, lanes.count);
}

// ---- [batch][channels][positions]

template <typename T, typename Act>
class ChannelsFirst {
  using S = AccumulateType<T>;

 public:
  static constexpr int64_t kUnit = Wide<S>::kWidth;
  static constexpr int64_t kMost = 16 * kUnit;

  explicit ChannelsFirst(const Backward& f)
      : f_(f), position_(f.channels), scratch_(2 * kUnit * f.channels), lane_sums_(2 * kLanes * f.channels) {}

  static int64_t offset(const Backward& f, int64_t b, int64_t first) { return b * f.channels * f.positions + first; }

  void run(const Block<T>& block) {
    for (int64_t i = 0; i < 2 * kLanes * f_.channels; ++i) lane_sums_[i] = 0;
    for_each_vector<S>(block.n, [&](int64_t i, auto lanes) { tile(block, i, lanes); });
    for (int64_t c = 0; c < f_.channels; ++c) {
      block.sums[c] = sum(Vec<S>::load(&lane_sums_[2 * kLanes * c]));
      block.sums[f_.channels + c] = sum(Vec<S>::load(&lane_sums_[2 * kLanes * c + kLanes]));
    }
  }

 private:
  static constexpr int64_t kLanes = Vec<S>::kWidth;

  // The positions of one vector, all channels; g and xhat are kept in between.
  template <typename Lanes>
  IMAGEN_FAST_INLINE void tile(const Block<T>& block, int64_t i, Lanes lanes) {
    using V = typename Lanes::V;
    const V rstd = load(block.rstd + i, lanes);
    V total(S(0));
    for (int64_t first = 0; first < f_.channels; first += kChain) {
      const int64_t end = first + kChain < f_.channels ? first + kChain : f_.channels;
      V part(S(0));
      for (int64_t c = first; c < end; ++c) {
        const V xhat = load(block.x + c * f_.positions + i, lanes) * rstd;
        const V multiplier(block.multiplier[c]);
        const V slope = Act::template slope<T>(fma(xhat, multiplier, V(block.offset[c])));
        const V dt = keep(load(block.dy + c * f_.positions + i, lanes) * slope, lanes);
        S* sums = &lane_sums_[2 * kLanes * c];
        (Vec<S>::load(sums) + sum_of_vectors(dt)).store(sums);
        add_products(dt, xhat, Vec<S>::load(sums + kLanes)).store(sums + kLanes);
        const V g = dt * multiplier;
        part = fma(g, xhat, part);
        g.store(&scratch_[2 * kUnit * c]);
        xhat.store(&scratch_[2 * kUnit * c + kUnit]);
      }
      total = total + part;
    }
    if (!block.dx) return;
    S means[V::kWidth], factors[V::kWidth];
    total.store(means);
    rstd.store(factors);
    for (int64_t k = 0; k < V::kWidth; ++k) {
      const Terms<S> terms = position_.terms(factors[k], means[k]);
      factors[k] = terms.factor;
      means[k] = terms.mean;
    }
    const V mean = V::load(means);
    const V factor = V::load(factors);
    for (int64_t c = 0; c < f_.channels; ++c) {
      const V rest = V::load(&scratch_[2 * kUnit * c]) - V::load(&scratch_[2 * kUnit * c + kUnit]) * mean;
      store(rest * factor, block.dx + c * f_.positions + i, lanes);
    }
  }

  const Backward& f_;
  const Position<S> position_;
  Buffer<S> scratch_;    // [channels][g, xhat][positions of a tile]
  Buffer<S> lane_sums_;  // [channels][dt, dt * xhat][lanes]
};

// ---- [batch][positions][channels]

template <typename T, typename Act>
class ChannelsLast {
  using S = AccumulateType<T>;

 public:
  static constexpr int64_t kUnit = 4;
  static constexpr int64_t kMost = 256;

  explicit ChannelsLast(const Backward& f) : f_(f), position_(f.channels), g_(f.channels) {}

  static int64_t offset(const Backward& f, int64_t b, int64_t first) { return (b * f.positions + first) * f.channels; }

  void run(const Block<T>& block) {
    for (int64_t c = 0; c < 2 * f_.channels; ++c) block.sums[c] = 0;
    for (int64_t i = 0; i < block.n; ++i) row(block, i);
  }

 private:
  IMAGEN_FAST_INLINE void row(const Block<T>& block, int64_t i) {
    const T* x = block.x + i * f_.channels;
    const T* dy = block.dy + i * f_.channels;
    const S rstd = block.rstd[i];
    S* sum_dt = block.sums;
    S* sum_dt_xhat = block.sums + f_.channels;
    RowSum<S> total;
    for_each_vector<S>(f_.channels, [&](int64_t c, auto lanes) {
      using V = typename decltype(lanes)::V;
      const V xhat = load(x + c, lanes) * V(rstd);
      const V multiplier = load(block.multiplier + c, lanes);
      const V slope = Act::template slope<T>(fma(xhat, multiplier, load(block.offset + c, lanes)));
      const V dt = load(dy + c, lanes) * slope;
      store(load(sum_dt + c, lanes) + dt, sum_dt + c, lanes);
      store(fma(dt, xhat, load(sum_dt_xhat + c, lanes)), sum_dt_xhat + c, lanes);
      const V g = dt * multiplier;
      total.add_product(g, xhat, lanes);
      store(g, &g_[c], lanes);
    });
    if (!block.dx) return;
    const Terms<S> terms = position_.terms(rstd, total.total());
    for_each_vector<S>(f_.channels, [&](int64_t c, auto lanes) {
      using V = typename decltype(lanes)::V;
      const V xhat = load(x + c, lanes) * V(rstd);
      store((load(&g_[c], lanes) - xhat * V(terms.mean)) * V(terms.factor), block.dx + i * f_.channels + c, lanes);
    });
  }

  const Backward& f_;
  const Position<S> position_;
  Buffer<S> g_;  // of one position
};

template <typename T, typename Layout>
void run(const Backward& f) {
  using S = AccumulateType<T>;
  const Blocks blocks(f, Layout::kUnit, Layout::kMost);
  Buffer<S> sums(f.batch * blocks.per_sample * 2 * f.channels);  // [batch][blocks][dt, dt * xhat][channels]
  parallel_for(f.batch * blocks.per_sample, blocks.size * f.channels, [&](int64_t begin, int64_t end) {
    Layout layout(f);
    SampleAffine<S> affine(f);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t b = k / blocks.per_sample;
      const int64_t first = k % blocks.per_sample * blocks.size;
      const int64_t at = Layout::offset(f, b, first);
      affine.prepare(b);
      layout.run({static_cast<const T*>(f.dy) + at, static_cast<const T*>(f.x) + at,
                  f.dx ? static_cast<T*>(f.dx) + at : nullptr, static_cast<const S*>(f.rstd) + b * f.positions + first,
                  f.positions - first < blocks.size ? f.positions - first : blocks.size, affine.multiplier(),
                  affine.offset(), sums.data() + k * 2 * f.channels});
    }
  });

  Buffer<ChannelSums> channel_sums(f.batch * f.channels);
  parallel_for(f.batch * f.channels, 2 * blocks.per_sample, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const S* first = sums.data() + i / f.channels * blocks.per_sample * 2 * f.channels + i % f.channels;
      ChannelSums total{0, 0};
      for (int64_t k = 0; k < blocks.per_sample; ++k) {
        total.dt += first[k * 2 * f.channels];
        total.dt_xhat += first[(k * 2 + 1) * f.channels];
      }
      channel_sums[i] = total;
    }
  });
  parameter_gradients<S>(f.parameters, f.gradients, channel_sums.data(), f.batch, f.channels);
}

struct Run {
  const Backward& f;

  template <typename T, typename Act>
  void operator()() const {
    if constexpr (kHasRoughSlope<T, Act>) {
      if (f.gradients.are_finer_than_bfloat16()) return in_layout<T, Finely<Act>>();
    }
    in_layout<T, Act>();
  }

  template <typename T, typename Act>
  void in_layout() const {
    f.channels_last ? run<T, ChannelsLast<T, Act>>(f) : run<T, ChannelsFirst<T, Act>>(f);
  }
};

}  // namespace
}  // namespace channel_rms_norm_act

void channel_rms_norm_act_backward(const imagen_fast::channel_rms_norm_act::Backward& f) {
  dispatch(f, channel_rms_norm_act::Run{f});
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
