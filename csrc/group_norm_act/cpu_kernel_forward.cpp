// group_norm_act on the CPU. Compiled once per instruction set.
#include <cstring>

#include "cpu_statistics.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace group_norm_act {
namespace {

// The centre of t = (x - mean) * multiplier + offset is subtracted first: folding it into the offset would lose the
// small differences from a large mean. Only the part of the mean that float cannot hold is folded.
template <typename S>
Affine<S> fold(const Statistics<S>& statistics, Affine<S> affine) {
  const S multiplier = statistics.rstd * affine.multiplier;
  return {multiplier, affine.offset - statistics.mean_rest * multiplier};
}

template <typename S>
void save(const Forward& f, int64_t slab, const Statistics<S>& statistics) {
  static_cast<S*>(f.mean)[slab] = statistics.mean;
  static_cast<S*>(f.rstd)[slab] = statistics.rstd;
}

// ---- [batch][channels][positions]

// y = act((x - mean) * multiplier + offset) over part of one channel
template <typename T, typename Act, typename S>
void apply_row(const T* x, T* y, int64_t n, S mean, Affine<S> affine) {
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V t = fma(load(x + i, lanes) - V(mean), V(affine.multiplier), V(affine.offset));
    store(Act::template value<T>(t), y + i, lanes);
  });
}

template <typename T, typename Act>
class ChannelsFirst {
  using S = AccumulateType<T>;

  // Elements; 256 additions deep, and the part that is read twice fits the first-level cache.
  static constexpr int64_t kChunk = 256 * Wide<S>::kWidth;

 public:
  explicit ChannelsFirst(const Forward& f)
      : f_(f),
        group_size_(f.channels / f.groups),
        slabs_(f.batch * f.groups),
        slab_size_(group_size_ * f.positions),
        chunks_(ceil_div(slab_size_, kChunk)) {}

  void run() const { should_split_slabs(slabs_, slab_size_) ? run_split() : run_whole(); }

 private:
  // A slab at a time, each read from memory once if it fits the second-level cache.
  void run_whole() const {
    parallel_for(slabs_, slab_size_, [&](int64_t begin, int64_t end) {
      Buffer<Moments> moments(chunks_);
      for (int64_t slab = begin; slab < end; ++slab) {
        for (int64_t k = 0; k < chunks_; ++k) moments[k] = measure(slab, k);
        const Statistics<S> statistics = finish(slab, moments.data());
        // Backwards: of a slab larger than the cache, the end is what is still in it.
        for (int64_t c = group_size_ - 1; c >= 0; --c) apply(slab, c, 0, f_.positions, statistics);
      }
    });
  }

  // All threads on all slabs, for few and large ones.
  void run_split() const {
    Buffer<Moments> moments(slabs_ * chunks_);
    parallel_for(slabs_ * chunks_, kChunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) moments[i] = measure(i / chunks_, i % chunks_);
    });
    Buffer<Statistics<S>> statistics(slabs_);
    for (int64_t slab = 0; slab < slabs_; ++slab) statistics[slab] = finish(slab, moments.data() + slab * chunks_);
    const int64_t parts = ceil_div(f_.positions, kChunk);  // of a channel
    const int64_t tasks = slabs_ * group_size_ * parts;
    parallel_for(tasks, f_.positions / parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {
        const int64_t slab = i / parts / group_size_;
        const int64_t first = i % parts * kChunk;
        const int64_t n = f_.positions - first < kChunk ? f_.positions - first : kChunk;
        apply(slab, i / parts % group_size_, first, n, statistics[slab]);
      }
    });
  }

  Moments measure(int64_t slab, int64_t chunk) const {
    return chunk_moments(static_cast<const T*>(f_.x) + slab * slab_size_ + chunk * kChunk,
                         chunk + 1 < chunks_ ? kChunk : last_chunk());
  }

  Statistics<S> finish(int64_t slab, const Moments* moments) const {
    const auto statistics = combine<S>(moments, 1, chunks_, kChunk, static_cast<double>(last_chunk()), f_.eps);
    save(f_, slab, statistics);
    return statistics;
  }

  // Positions [first, first + n) of the slab's channel c
  void apply(int64_t slab, int64_t c, int64_t first, int64_t n, const Statistics<S>& statistics) const {
    const int64_t channel = slab % f_.groups * group_size_ + c;
    const auto affine = fold(statistics, channel_affine<S>(f_.parameters, slab / f_.groups, channel));
    const int64_t at = slab * slab_size_ + c * f_.positions + first;
    apply_row<T, Act>(static_cast<const T*>(f_.x) + at, static_cast<T*>(f_.y) + at, n, statistics.mean, affine);
  }

  int64_t last_chunk() const { return slab_size_ - (chunks_ - 1) * kChunk; }

  const Forward& f_;
  const int64_t group_size_;
  const int64_t slabs_;
  const int64_t slab_size_;
  const int64_t chunks_;  // of a slab
};

// ---- [batch][positions][channels]

// y = act((x - mean[c]) * multiplier[c] + offset[c]) over n elements in rows of `width`
template <typename T, typename Act, typename S>
void apply_columns(const T* x, T* y, int64_t n, int64_t width, const S* mean, const S* multiplier, const S* offset) {
  for_each_column_vector<S>(n, width, [&](int64_t i, int64_t c, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V d = load(x + i, lanes) - load_column(mean + c, lanes);
    const V t = fma(d, V(load_column(multiplier + c, lanes)), V(load_column(offset + c, lanes)));
    store(Act::template value<T>(t), y + i, lanes);
  });
}

template <typename T, typename Act>
class ChannelsLast {
  using S = AccumulateType<T>;

 public:
  explicit ChannelsLast(const Forward& f) : f_(f), columns_(f.channels), blocks_(f, 32768, 1024) {}

  void run() const { should_split_slabs(f_.batch, f_.positions * f_.channels) ? run_split() : run_whole(); }

 private:
  // A sample at a time
  void run_whole() const {
    parallel_for(f_.batch, f_.positions * f_.channels, [&](int64_t begin, int64_t end) {
      Buffer<S> scratch(3 * columns_.width);
      Buffer<T> rows(joined_elements());
      Buffer<Moments> moments(blocks_.per_sample * f_.groups);
      Buffer<Statistics<S>> statistics(f_.groups);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * blocks_.per_sample;
        for (int64_t i = 0; i < blocks_.per_sample; ++i) {
          measure(first + i, rows.data(), scratch.data(), moments.data() + i * f_.groups);
        }
        for (int64_t g = 0; g < f_.groups; ++g) statistics[g] = finish(b * f_.groups + g, moments.data() + g);
        prepare(b, statistics.data(), scratch.data());
        // Backwards: of a sample larger than the cache, the end is what is still in it.
        for (int64_t i = blocks_.per_sample - 1; i >= 0; --i) apply(first + i, rows.data(), scratch.data());
      }
    });
  }

  // All threads on all samples, for few and large ones.
  void run_split() const {
    const int64_t blocks = f_.batch * blocks_.per_sample;
    const int64_t block_elements = blocks_.size * f_.channels;
    Buffer<Moments> moments(blocks * f_.groups);
    parallel_for(blocks, block_elements, [&](int64_t begin, int64_t end) {
      Buffer<S> scratch(3 * columns_.width);
      Buffer<T> rows(joined_elements());
      for (int64_t i = begin; i < end; ++i) measure(i, rows.data(), scratch.data(), moments.data() + i * f_.groups);
    });

    Buffer<Statistics<S>> statistics(f_.batch * f_.groups);
    parallel_for(f_.batch * f_.groups, blocks_.per_sample, [&](int64_t begin, int64_t end) {
      for (int64_t slab = begin; slab < end; ++slab) {
        const int64_t b = slab / f_.groups;
        statistics[slab] = finish(slab, moments.data() + b * blocks_.per_sample * f_.groups + slab % f_.groups);
      }
    });

    // Each thread walks its blocks backwards: the last ones it has read are still in its cache.
    parallel_for(blocks, block_elements, [&](int64_t begin, int64_t end) {
      Buffer<S> scratch(3 * columns_.width);
      Buffer<T> rows(joined_elements());
      int64_t prepared = -1;  // the sample that scratch is for
      for (int64_t i = end - 1; i >= begin; --i) {
        const int64_t b = i / blocks_.per_sample;
        if (b != prepared) prepare(b, statistics.data() + b * f_.groups, scratch.data());
        prepared = b;
        apply(i, rows.data(), scratch.data());
      }
    });
  }

  // Block i, counted through all samples; scratch holds 3 values a column, and rows `joined_elements`.
  void measure(int64_t i, T* rows, S* scratch, Moments* moments) const {
    block_moments(block(i, rows), elements(i), columns_, f_.groups, scratch, moments);
  }

  // `moments` are those of the slab's group in its sample's blocks, a block after `groups` others.
  Statistics<S> finish(int64_t slab, const Moments* moments) const {
    const double group_size = static_cast<double>(f_.channels / f_.groups);
    const double last = static_cast<double>(blocks_.length(blocks_.per_sample - 1));
    const auto statistics = combine<S>(moments, f_.groups, blocks_.per_sample,
                                       group_size * static_cast<double>(blocks_.size), group_size * last, f_.eps);
    save(f_, slab, statistics);
    return statistics;
  }

  // scratch: mean, multiplier, offset, each by column
  void prepare(int64_t b, const Statistics<S>* statistics, S* scratch) const {
    S* mean = scratch;
    S* multiplier = mean + columns_.width;
    S* offset = multiplier + columns_.width;
    const int64_t group_size = f_.channels / f_.groups;
    for (int64_t g = 0; g < f_.groups; ++g) {
      for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) {
        const auto affine = fold(statistics[g], channel_affine<S>(f_.parameters, b, c));
        mean[c] = statistics[g].mean;
        multiplier[c] = affine.multiplier;
        offset[c] = affine.offset;
      }
    }
    columns_.repeat(mean);
    columns_.repeat(multiplier);
    columns_.repeat(offset);
  }

  // Block i, with what `prepare` made of its sample
  void apply(int64_t i, T* rows, const S* scratch) const {
    apply_columns<T, Act>(block(i, rows), static_cast<T*>(f_.y) + position(i) * f_.channels, elements(i),
                          columns_.width, scratch, scratch + columns_.width, scratch + 2 * columns_.width);
  }

  // Block i of x where it is, or with the channels of skip beside it, in rows.
  const T* block(int64_t i, T* rows) const {
    const int64_t own = f_.channels - f_.skip_channels;
    const T* x = static_cast<const T*>(f_.x) + position(i) * own;
    if (f_.skip_channels == 0) return x;
    const T* skip = static_cast<const T*>(f_.skip) + position(i) * f_.skip_channels;
    T* to = rows;
    for (int64_t n = blocks_.length(i % blocks_.per_sample); n > 0; --n) {
      std::memcpy(to, x, static_cast<size_t>(own) * sizeof(T));
      std::memcpy(to + own, skip, static_cast<size_t>(f_.skip_channels) * sizeof(T));
      to += f_.channels;
      x += own;
      skip += f_.skip_channels;
    }
    return rows;
  }

  // What a block takes of memory if it is joined
  int64_t joined_elements() const { return f_.skip_channels == 0 ? 0 : blocks_.size * f_.channels; }
  // The first of block i, counted through all samples
  int64_t position(int64_t i) const {
    return i / blocks_.per_sample * f_.positions + blocks_.begin(i % blocks_.per_sample);
  }
  int64_t elements(int64_t i) const { return blocks_.length(i % blocks_.per_sample) * f_.channels; }

  const Forward& f_;
  const Columns columns_;
  const Blocks blocks_;
};

struct Run {
  const Forward& f;

  template <typename T, typename Act>
  void operator()() const {
    f.channels_last ? ChannelsLast<T, Act>(f).run() : ChannelsFirst<T, Act>(f).run();
  }
};

}  // namespace
}  // namespace group_norm_act

void group_norm_act_forward(const imagen_fast::group_norm_act::Forward& f) { dispatch(f, group_norm_act::Run{f}); }

}  // namespace imagen_fast::IMAGEN_FAST_ISA
