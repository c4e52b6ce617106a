// The gradient of group_norm_act on the CPU. Compiled once per instruction set.
//
// With d = x - mean and t = d * multiplier + offset the activation's argument, dt = dy * act'(t) is recomputed; nothing
// but x, mean and rstd is kept from the forward pass. Per channel, sum(dt) and sum(dt * xhat) are what the gradients of
// weight, bias, scale and shift are made of (../common/parameters.h), and per group they give the two numbers in
//   dx = dt * multiplier - constant - d * slope
//   constant = rstd * sum_c(affine_c * sum(dt)) / N
//   slope = rstd^2 * sum_c(affine_c * sum(dt * xhat)) / N
#include "cpu_common.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace group_norm_act {
namespace {

// Sums over one channel; with d instead of xhat until the channel is complete
template <typename S>
struct Sums {
  S dt;
  S dt_d;
};

// What dx needs to know of a group
template <typename S>
struct GroupTerms {
  S constant;
  S slope;
};

// Gathers the sums of a group's channels, in order, and stores them in `sums`, (batch, channels).
template <typename S>
class GroupSums {
 public:
  GroupSums(const Backward& f, int64_t slab, ChannelSums* sums)
      : f_(f),
        slab_(slab),
        sums_(sums),
        rstd_(static_cast<const S*>(f.rstd)[slab]),
        group_size_(f.channels / f.groups) {}

  void add(int64_t c, double dt, double dt_d) {
    const int64_t b = slab_ / f_.groups;
    const int64_t channel = slab_ % f_.groups * group_size_ + c;
    const double dt_xhat = dt_d * rstd_;
    sums_[b * f_.channels + channel] = {dt, dt_xhat};
    const double multiplier = channel_affine<S>(f_.parameters, b, channel).multiplier;
    constant_ += multiplier * dt;
    slope_ += multiplier * dt_xhat;
  }

  GroupTerms<S> terms() const {
    const double scale = rstd_ / static_cast<double>(group_size_ * f_.positions);
    return {static_cast<S>(constant_ * scale), static_cast<S>(slope_ * scale * rstd_)};
  }

 private:
  const Backward& f_;
  const int64_t slab_;
  ChannelSums* const sums_;
  const double rstd_;
  const int64_t group_size_;
  double constant_ = 0;
  double slope_ = 0;
};

// ---- [batch][channels][positions]

// Keep: dt goes to `kept` too.
template <typename T, typename Act, bool Keep, typename S>
Sums<S> sum_row(const T* dy, const T* x, int64_t n, S mean, Affine<S> affine, [[maybe_unused]] S* kept) {
  RowSum<S> sum_dt;
  RowSum<S> sum_dt_d;
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V d = load(x + i, lanes) - V(mean);
    const V dt = load(dy + i, lanes) * Act::template slope<T>(fma(d, V(affine.multiplier), V(affine.offset)));
    sum_dt.add(dt, lanes);
    sum_dt_d.add_product(dt, d, lanes);
    if constexpr (Keep) store(dt, kept + i, lanes);
  });
  return {sum_dt.total(), sum_dt_d.total()};
}

template <typename T, typename S>
void apply_row_kept(const S* kept, const T* x, T* dx, int64_t n, S mean, S multiplier, GroupTerms<S> terms) {
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V d = load(x + i, lanes) - V(mean);
    const V dt = load(kept + i, lanes);
    store(fms(dt, V(multiplier), fma(d, V(terms.slope), V(terms.constant))), dx + i, lanes);
  });
}

template <typename T, typename Act, typename S>
void apply_row(const T* dy, const T* x, T* dx, int64_t n, S mean, Affine<S> affine, GroupTerms<S> terms) {
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V d = load(x + i, lanes) - V(mean);
    const V multiplier(affine.multiplier);
    const V dt = load(dy + i, lanes) * Act::template slope<T>(fma(d, multiplier, V(affine.offset)));
    store(fms(dt, multiplier, fma(d, V(terms.slope), V(terms.constant))), dx + i, lanes);
  });
}

template <typename T, typename Act>
class ChannelsFirst {
  using S = AccumulateType<T>;

  // Positions of a channel that are summed in float before they join a sum in double
  static constexpr int64_t kPart = 64 * Wide<S>::kWidth;

  // Bytes of dt that stay in the second-level cache beside x; of a slab with no more, dt is not computed twice.
  static constexpr int64_t kKeptBytes = 256 * 1024;

 public:
  ChannelsFirst(const Backward& f, ChannelSums* sums)
      : f_(f),
        channel_sums_(sums),
        group_size_(f.channels / f.groups),
        slabs_(f.batch * f.groups),
        parts_(ceil_div(f.positions, kPart)) {}

  void run() const { should_split_slabs(slabs_, group_size_ * f_.positions) ? run_split() : run_whole(); }

 private:
  void run_whole() const {
    const int64_t slab_size = group_size_ * f_.positions;
    const bool keeps = f_.dx && slab_size * static_cast<int64_t>(sizeof(S)) <= kKeptBytes;
    parallel_for(slabs_, slab_size, [&](int64_t begin, int64_t end) {
      Buffer<Sums<S>> sums(group_size_ * parts_);
      Buffer<S> kept(keeps ? slab_size : 0);
      for (int64_t slab = begin; slab < end; ++slab) {
        S* const dt = keeps ? kept.data() : nullptr;
        for (int64_t i = 0; i < group_size_ * parts_; ++i) sums[i] = measure(slab, i, dt);
        const GroupTerms<S> terms = finish(slab, sums.data());
        for (int64_t i = f_.dx ? group_size_ * parts_ - 1 : -1; i >= 0; --i) apply(slab, i, terms, dt);
      }
    });
  }

  void run_split() const {
    const int64_t per_slab = group_size_ * parts_;
    Buffer<Sums<S>> sums(slabs_ * per_slab);
    parallel_for(slabs_ * per_slab, f_.positions / parts_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sums[i] = measure(i / per_slab, i % per_slab);
    });
    Buffer<GroupTerms<S>> terms(slabs_);
    for (int64_t slab = 0; slab < slabs_; ++slab) terms[slab] = finish(slab, sums.data() + slab * per_slab);
    if (!f_.dx) return;
    parallel_for(slabs_ * per_slab, f_.positions / parts_, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) apply(i / per_slab, i % per_slab, terms[i / per_slab]);
    });
  }

  // Part i, counted through the slab's channels
  struct Part {
    int64_t offset;  // in the tensor
    int64_t size;
    S mean;
    Affine<S> affine;
  };
  Part part(int64_t slab, int64_t i) const {
    const int64_t c = i / parts_;
    const int64_t first = i % parts_ * kPart;
    const int64_t channel = slab % f_.groups * group_size_ + c;
    Affine<S> affine = channel_affine<S>(f_.parameters, slab / f_.groups, channel);
    affine.multiplier *= static_cast<const S*>(f_.rstd)[slab];
    return {(slab * group_size_ + c) * f_.positions + first,
            f_.positions - first < kPart ? f_.positions - first : kPart, static_cast<const S*>(f_.mean)[slab], affine};
  }

  // dt of the whole slab, if it is not null, is written by `measure` and read by `apply`.
  Sums<S> measure(int64_t slab, int64_t i, S* dt = nullptr) const {
    const Part p = part(slab, i);
    const T* dy = static_cast<const T*>(f_.dy) + p.offset;
    const T* x = static_cast<const T*>(f_.x) + p.offset;
    if (!dt) return sum_row<T, Act, false, S>(dy, x, p.size, p.mean, p.affine, nullptr);
    return sum_row<T, Act, true>(dy, x, p.size, p.mean, p.affine, dt + p.offset - slab * group_size_ * f_.positions);
  }

  GroupTerms<S> finish(int64_t slab, const Sums<S>* sums) const {
    GroupSums<S> group(f_, slab, channel_sums_);
    for (int64_t c = 0; c < group_size_; ++c) {
      double dt = 0;
      double dt_d = 0;
      for (int64_t k = c * parts_; k < (c + 1) * parts_; ++k) {
        dt += sums[k].dt;
        dt_d += sums[k].dt_d;
      }
      group.add(c, dt, dt_d);
    }
    return group.terms();
  }

  void apply(int64_t slab, int64_t i, GroupTerms<S> terms, const S* dt = nullptr) const {
    const Part p = part(slab, i);
    const T* x = static_cast<const T*>(f_.x) + p.offset;
    T* dx = static_cast<T*>(f_.dx) + p.offset;
    if (dt) {
      const S* kept = dt + p.offset - slab * group_size_ * f_.positions;
      return apply_row_kept(kept, x, dx, p.size, p.mean, p.affine.multiplier, terms);
    }
    apply_row<T, Act>(static_cast<const T*>(f_.dy) + p.offset, x, dx, p.size, p.mean, p.affine, terms);
  }

  const Backward& f_;
  ChannelSums* const channel_sums_;
  const int64_t group_size_;
  const int64_t slabs_;
  const int64_t parts_;  // of a channel
};

// ---- [batch][positions][channels]

// One value per column
template <typename S>
struct ColumnTerms {
  ColumnTerms(S* scratch, int64_t width)
      : mean(scratch),
        multiplier(scratch + width),
        offset(scratch + 2 * width),
        constant(scratch + 3 * width),
        slope(scratch + 4 * width) {}

  S* mean;
  S* multiplier;
  S* offset;
  S* constant;
  S* slope;
};

template <typename T, typename Act, typename S>
void sum_columns(const T* dy, const T* x, int64_t n, int64_t width, const ColumnTerms<S>& column, S* sum_dt,
                 S* sum_dt_d) {
  for (int64_t c = 0; c < width; ++c) sum_dt[c] = sum_dt_d[c] = 0;
  for_each_column_vector<S>(n, width, [&](int64_t i, int64_t c, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V d = load(x + i, lanes) - load_column(column.mean + c, lanes);
    const V t = fma(d, V(load_column(column.multiplier + c, lanes)), V(load_column(column.offset + c, lanes)));
    const V dt = load(dy + i, lanes) * Act::template slope<T>(t);
    add_to_column(dt, sum_dt + c, lanes);
    add_product_to_column(dt, d, sum_dt_d + c, lanes);
  });
}

template <typename T, typename Act, typename S>
void apply_columns(const T* dy, const T* x, T* dx, int64_t n, int64_t width, const ColumnTerms<S>& column) {
  for_each_column_vector<S>(n, width, [&](int64_t i, int64_t c, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V d = load(x + i, lanes) - load_column(column.mean + c, lanes);
    const V multiplier = load_column(column.multiplier + c, lanes);
    const V t = fma(d, multiplier, V(load_column(column.offset + c, lanes)));
    const V dt = load(dy + i, lanes) * Act::template slope<T>(t);
    const V rest = fma(d, V(load_column(column.slope + c, lanes)), V(load_column(column.constant + c, lanes)));
    store(fms(dt, multiplier, rest), dx + i, lanes);
  });
}

template <typename T, typename Act>
class ChannelsLast {
  using S = AccumulateType<T>;

 public:
  ChannelsLast(const Backward& f, ChannelSums* sums)
      : f_(f), channel_sums_(sums), columns_(f.channels), blocks_(f, 32768, 128 * columns_.positions) {}

  void run() const {
    const int64_t blocks = f_.batch * blocks_.per_sample;
    const int64_t block_elements = blocks_.size * f_.channels;
    // [blocks][dt, dt * d][width]
    Buffer<S> sums(blocks * 2 * columns_.width);
    parallel_for(blocks, block_elements, [&](int64_t begin, int64_t end) {
      Buffer<S> scratch(5 * columns_.width);
      const ColumnTerms<S> column(scratch.data(), columns_.width);
      int64_t prepared = -1;  // the sample that scratch is for
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks_.per_sample;
        if (b != prepared) prepare(b, nullptr, column);
        prepared = b;
        S* sum_dt = sums.data() + i * 2 * columns_.width;
        S* sum_dt_d = sum_dt + columns_.width;
        sum_columns<T, Act>(static_cast<const T*>(f_.dy) + offset(i), static_cast<const T*>(f_.x) + offset(i),
                            elements(i), columns_.width, column, sum_dt, sum_dt_d);
        columns_.fold(sum_dt);
        columns_.fold(sum_dt_d);
      }
    });

    Buffer<GroupTerms<S>> terms(f_.batch * f_.groups);
    parallel_for(f_.batch * f_.groups, 2 * blocks_.per_sample * f_.channels / f_.groups,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t slab = begin; slab < end; ++slab) terms[slab] = finish(slab, sums.data());
                 });
    if (!f_.dx) return;

    parallel_for(blocks, block_elements, [&](int64_t begin, int64_t end) {
      Buffer<S> scratch(5 * columns_.width);
      const ColumnTerms<S> column(scratch.data(), columns_.width);
      int64_t prepared = -1;
      for (int64_t i = end - 1; i >= begin; --i) {
        const int64_t b = i / blocks_.per_sample;
        if (b != prepared) prepare(b, terms.data() + b * f_.groups, column);
        prepared = b;
        apply_columns<T, Act>(static_cast<const T*>(f_.dy) + offset(i), static_cast<const T*>(f_.x) + offset(i),
                              static_cast<T*>(f_.dx) + offset(i), elements(i), columns_.width, column);
      }
    });
  }

 private:
  GroupTerms<S> finish(int64_t slab, const S* sums) const {
    const int64_t b = slab / f_.groups;
    const int64_t group_size = f_.channels / f_.groups;
    GroupSums<S> group(f_, slab, channel_sums_);
    for (int64_t c = 0; c < group_size; ++c) {
      double dt = 0;
      double dt_d = 0;
      for (int64_t k = b * blocks_.per_sample; k < (b + 1) * blocks_.per_sample; ++k) {
        const S* column = sums + k * 2 * columns_.width + slab % f_.groups * group_size + c;
        dt += column[0];
        dt_d += column[columns_.width];
      }
      group.add(c, dt, dt_d);
    }
    return group.terms();
  }

  // The columns of sample b; `terms` of its groups where they are known
  void prepare(int64_t b, const GroupTerms<S>* terms, const ColumnTerms<S>& column) const {
    const int64_t group_size = f_.channels / f_.groups;
    for (int64_t g = 0; g < f_.groups; ++g) {
      const S mean = static_cast<const S*>(f_.mean)[b * f_.groups + g];
      const S rstd = static_cast<const S*>(f_.rstd)[b * f_.groups + g];
      for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) {
        const auto affine = channel_affine<S>(f_.parameters, b, c);
        column.mean[c] = mean;
        column.multiplier[c] = rstd * affine.multiplier;
        column.offset[c] = affine.offset;
        column.constant[c] = terms ? terms[g].constant : S(0);
        column.slope[c] = terms ? terms[g].slope : S(0);
      }
    }
    S* const arrays[] = {column.mean, column.multiplier, column.offset, column.constant, column.slope};
    for (S* array : arrays) columns_.repeat(array);
  }

  // Of block i, counted through all samples
  int64_t offset(int64_t i) const {
    const int64_t b = i / blocks_.per_sample;
    return (b * f_.positions + blocks_.begin(i % blocks_.per_sample)) * f_.channels;
  }
  int64_t elements(int64_t i) const { return blocks_.length(i % blocks_.per_sample) * f_.channels; }

  const Backward& f_;
  ChannelSums* const channel_sums_;
  const Columns columns_;
  const Blocks blocks_;
};

struct Run {
  const Backward& f;

  template <typename T, typename Act>
  void operator()() const {
    if constexpr (kHasRoughSlope<T, Act>) {
      if (f.gradients.are_finer_than_bfloat16()) return run<T, Finely<Act>>();
    }
    run<T, Act>();
  }

  template <typename T, typename Act>
  void run() const {
    Buffer<ChannelSums> sums(f.batch * f.channels);
    f.channels_last ? ChannelsLast<T, Act>(f, sums.data()).run() : ChannelsFirst<T, Act>(f, sums.data()).run();
    parameter_gradients<AccumulateType<T>>(f.parameters, f.gradients, sums.data(), f.batch, f.channels);
  }
};

}  // namespace
}  // namespace group_norm_act

void group_norm_act_backward(const imagen_fast::group_norm_act::Backward& f) { dispatch(f, group_norm_act::Run{f}); }

}  // namespace imagen_fast::IMAGEN_FAST_ISA
