// A sample is worked on in blocks of positions, a channel's row after the other, each row in the first-level cache.
// Without a dynamic threshold that is one pass over memory. With it, x0 is computed, its quantile selected, and the
// rest done in a second pass that finds x0 where the first left it: in the memory of the result if that has room for
// it. A sample is one thread's, or, if there are fewer of them than threads, all threads work on one after the other.
#include "../common/element_types.h"
#include "../common/philox.h"
#include "../common/quantile.h"
#include "../common/vec_math.h"
#include "guidance.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace sampler_step {

using namespace imagen_fast::sampler_step;

namespace {

constexpr uint32_t kStage = 0;  // of the noise stream

// A row of some tensor, and its coefficient in a sum
template <typename S>
struct Term {
  const S* row;
  S coefficient;
};

template <int kTerms, typename S>
void combine_terms(const Term<S>* term, S* to, int64_t n) {
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    V sum = V(load(term[0].row + i, lanes)) * V(term[0].coefficient);
#pragma GCC unroll 4
    for (int k = 1; k < kTerms; ++k) sum = fma(V(load(term[k].row + i, lanes)), V(term[k].coefficient), sum);
    store(sum, to + i, lanes);
  });
}

// Up to five terms; those with a coefficient of zero are left out.
template <typename S>
class Sum {
 public:
  void add(const S* row, double coefficient) {
    if (coefficient != 0) terms_[count_++] = {row, static_cast<S>(coefficient)};
  }

  // `to` may be one of the rows.
  void write(S* to, int64_t n) const {
    switch (count_) {
      case 0:
        for (int64_t i = 0; i < n; ++i) to[i] = 0;
        return;
      case 1: return combine_terms<1>(terms_, to, n);
      case 2: return combine_terms<2>(terms_, to, n);
      case 3: return combine_terms<3>(terms_, to, n);
      case 4: return combine_terms<4>(terms_, to, n);
      default: return combine_terms<5>(terms_, to, n);
    }
  }

 private:
  Term<S> terms_[5];
  int count_ = 0;
};

// Clips x0 * reciprocal to [-1, 1]; NaN stays NaN.
template <typename S>
void clip(S* x0, int64_t n, S reciprocal) {
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    store(min(V(1), max(V(-1), V(load(x0 + i, lanes)) * V(reciprocal))), x0 + i, lanes);
  });
}

template <typename S>
bool has_nan(const S* row, int64_t n) {
  Wide<S> found(S(0));
  Vec<S> found_in_rest(S(0));
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    const auto v = load(row + i, lanes);
    if constexpr (std::is_same_v<decltype(lanes), WholeWide<S>>) {
      found = select(abs(v) >= Wide<S>(0), found, v);
    } else {
      found_in_rest = select(abs(v) >= Vec<S>(0), found_in_rest, v);
    }
  });
  return std::isnan(sum(found) + sum(found_in_rest));
}

// noise * scale * exp(log-variance / 2), the log-variance as the output's variance channels v place it
template <typename S>
void scale_noise(const S* noise, const S* v, const Row& row, S* to, int64_t n) {
  for_each_vector<S>(n, [&](int64_t i, auto lanes) {
    using V = typename decltype(lanes)::V;
    const V share = fma(V(load(v + i, lanes)), V(S(0.5)), V(S(0.5)));
    const V half = fma(share, V(static_cast<S>(0.5 * row.max_log_variance)),
                       (V(1) - share) * V(static_cast<S>(0.5 * row.min_log_variance)));
    store(V(load(noise + i, lanes)) * exp<S>(half), to + i, lanes);
  });
}

template <typename T>
class Sampler {
  using S = AccumulateType<T>;

  static constexpr int64_t kRow = 512;  // elements
  static constexpr int64_t kCost = 4;   // of an element, in what parallel_for expects of one

  // The rows of one block; what a row is read or computed into unless it can be used where it is.
  struct Scratch {
    alignas(64) S sample[kRow], output[kRow], unconditional[kRow], previous_x0[kRow], variance[kRow];
    alignas(64) S noise[kRow + kNoiseElements + 4], x0[kRow], next[kRow];
    alignas(64) float normals[kRow + kNoiseElements + 4];
  };

 public:
  explicit Sampler(const Step& s)
      : s_(s),
        size_(s.channels * s.positions),
        blocks_((s.positions + kRow - 1) / kRow),
        quantile_needed_(s.threshold == Threshold::kDynamic && s.min_value < s.max_value),
        x0_in_next_(std::is_same_v<T, S> && s.channels == 1 && s.next.stride_p == 1) {}

  void run() const {
    const int64_t threads = num_threads();
    const int64_t rounds = (s_.batch + threads - 1) / threads;
    if (kCost * size_ > kElementsPerThread && 4 * rounds * threads > 5 * s_.batch) {
      for (int64_t b = 0; b < s_.batch; ++b) run_sample(b);
    } else {
      // Within it, a further parallel_for stays in the thread it is called from.
      parallel_for(s_.batch, kCost * size_, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) run_sample(b);
      });
    }
  }

 private:
  void run_sample(int64_t b) const {
    const auto guidance = make_guidance<T>(s_, b);
    if (quantile_needed_) return run_with_quantile(b, guidance);
    // What the threshold divides by, where it is known beforehand
    const S reciprocal = s_.threshold == Threshold::kDynamic ? S(1) / static_cast<S>(s_.max_value) : S(1);
    Buffer<bool> nan(blocks_);
    for_each_block([&](int64_t block, Scratch& scratch) {
      nan[block] = false;
      for_each_row(block, [&](int64_t c, int64_t p, int64_t n) {
        const auto rows = read_rows(kForBoth, b, c, p, n, guidance, scratch);
        write_x0(rows, scratch.x0, n);
        if (s_.threshold == Threshold::kDynamic) nan[block] |= has_nan(scratch.x0, n);
        if (s_.threshold != Threshold::kNone) clip(scratch.x0, n, reciprocal);
        write_next(rows, b, c, p, n, scratch.x0, scratch);
      });
    });
    for (int64_t i = 0; i < blocks_; ++i) {
      if (nan[i]) return fill_with_nan(b);
    }
  }

  void run_with_quantile(int64_t b, const Guided<S>& guidance) const {
    Buffer<S> own(x0_in_next_ ? 0 : size_);
    S* x0 = x0_in_next_ ? row_in_place<T, S>(s_.next, b, 0, 0) : own.data();
    for_each_block([&](int64_t block, Scratch& scratch) {
      for_each_row(block, [&](int64_t c, int64_t p, int64_t n) {
        write_x0(read_rows(kForX0, b, c, p, n, guidance, scratch), x0 + c * s_.positions + p, n);
      });
    });
    Buffer<Key<S>> keys(size_);
    S limit = abs_quantile(x0, size_, s_.percentile, keys.data());
    if (limit < static_cast<S>(s_.min_value)) limit = static_cast<S>(s_.min_value);
    if (limit > static_cast<S>(s_.max_value)) limit = static_cast<S>(s_.max_value);
    if (std::isnan(limit)) return fill_with_nan(b);
    for_each_block([&](int64_t block, Scratch& scratch) {
      for_each_row(block, [&](int64_t c, int64_t p, int64_t n) {
        S* row = x0 + c * s_.positions + p;
        clip(row, n, S(1) / limit);
        write_next(read_rows(kForNext, b, c, p, n, guidance, scratch), b, c, p, n, row, scratch);
      });
    });
  }

  // body(block, scratch) for all blocks of a sample
  template <typename Body>
  void for_each_block(Body&& body) const {
    parallel_for(blocks_, kCost * kRow * s_.channels, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t block = begin; block < end; ++block) body(block, scratch);
    });
  }

  template <typename Body>
  void for_each_row(int64_t block, Body&& body) const {
    const int64_t p = block * kRow;
    const int64_t n = s_.positions - p < kRow ? s_.positions - p : kRow;
    for (int64_t c = 0; c < s_.channels; ++c) body(c, p, n);
  }

  enum Purpose { kForX0 = 1, kForNext = 2, kForBoth = kForX0 | kForNext };

  // Null where the purpose needs none
  struct Rows {
    const S* sample;
    const S* guided;
    const S* noise;
  };

  Rows read_rows(Purpose purpose, int64_t b, int64_t c, int64_t p, int64_t n, const Guided<S>& guidance,
                 Scratch& scratch) const {
    const auto needed = [&](double for_x0, double for_next) {
      return ((purpose & kForX0) && for_x0 != 0) || ((purpose & kForNext) && for_next != 0);
    };
    Rows rows{};
    if (needed(s_.row.x0_from_sample, s_.row.next_from_sample)) {
      rows.sample = read_row<T>(s_.sample, b, c, p, n, scratch.sample);
    }
    if (needed(s_.row.x0_from_output, s_.row.next_from_output)) {
      rows.guided = read_row<T>(s_.output, b, c, p, n, scratch.output);
      if (s_.unconditional.data) {
        const S* unconditional = read_row<T>(s_.unconditional, b, c, p, n, scratch.unconditional);
        guidance.write(rows.guided, unconditional, scratch.output, n);
        rows.guided = scratch.output;
      }
    }
    if (needed(s_.row.x0_from_noise, s_.row.noise_scale)) rows.noise = read_noise(b, c, p, n, scratch);
    return rows;
  }

  const S* read_noise(int64_t b, int64_t c, int64_t p, int64_t n, Scratch& scratch) const {
    if (s_.noise.data) return read_row<T>(s_.noise, b, c, p, n, scratch.noise);
    const int64_t element = c * s_.positions + p;
    const int64_t skipped = element % 4;
    const NoiseStream stream{static_cast<uint64_t>(s_.seed[b]), s_.row_index, kStage};
    fill_normals(scratch.normals, stream, static_cast<uint64_t>(element - skipped), n + skipped);
    if constexpr (std::is_same_v<S, float>) {
      return scratch.normals + skipped;
    } else {
      for (int64_t i = 0; i < n; ++i) scratch.noise[i] = scratch.normals[i + skipped];
      return scratch.noise;
    }
  }

  // Before the threshold
  void write_x0(const Rows& rows, S* to, int64_t n) const {
    Sum<S> sum;
    sum.add(rows.sample, s_.row.x0_from_sample);
    sum.add(rows.guided, s_.row.x0_from_output);
    sum.add(rows.noise, s_.row.x0_from_noise);
    sum.write(to, n);
  }

  // x0 is clipped; it may lie where next will.
  void write_next(const Rows& rows, int64_t b, int64_t c, int64_t p, int64_t n, const S* x0, Scratch& scratch) const {
    if (s_.x0.data) write_row<T>(x0, s_.x0, b, c, p, n);
    Sum<S> sum;
    sum.add(rows.sample, s_.row.next_from_sample);
    sum.add(rows.guided, s_.row.next_from_output);
    sum.add(x0, s_.row.next_from_x0);
    if (s_.row.next_from_previous_x0 != 0) {
      sum.add(read_row<T>(s_.previous_x0, b, c, p, n, scratch.previous_x0), s_.row.next_from_previous_x0);
    }
    if (s_.row.noise_scale != 0) {
      const S* noise = rows.noise;
      if (s_.variance.data) {
        scale_noise(noise, read_row<T>(s_.variance, b, c, p, n, scratch.variance), s_.row, scratch.noise, n);
        noise = scratch.noise;
      }
      sum.add(noise, s_.row.noise_scale);
    }
    if (S* to = row_in_place<T, S>(s_.next, b, c, p)) return sum.write(to, n);
    sum.write(scratch.next, n);
    write_row<T>(scratch.next, s_.next, b, c, p, n);
  }

  void fill_with_nan(int64_t b) const {
    for_each_block([&](int64_t block, Scratch& scratch) {
      for (auto& value : scratch.next) value = std::nan("");
      for_each_row(block, [&](int64_t c, int64_t p, int64_t n) {
        write_row<T>(scratch.next, s_.next, b, c, p, n);
        if (s_.x0.data) write_row<T>(scratch.next, s_.x0, b, c, p, n);
      });
    });
  }

  const Step& s_;
  const int64_t size_;    // of a sample
  const int64_t blocks_;  // of a sample
  const bool quantile_needed_;
  const bool x0_in_next_;
};

}  // namespace
}  // namespace sampler_step

void sampler_step_kernel(const imagen_fast::sampler_step::Step& step) {
  using namespace sampler_step;
  with_element_type(step.dtype, [&](auto element) { Sampler<decltype(element)>(step).run(); });
}

void sampler_step_noise(const imagen_fast::sampler_step::NoiseTest& test) {
  const NoiseStream stream{test.seed, test.row, test.stage};
  fill_words(test.words, stream, test.first_counter, test.counters);
  Buffer<float> normals(4 * test.counters + kNoiseElements);
  fill_normals(normals.data(), stream, 4 * test.first_counter, 4 * test.counters);
  for (int64_t i = 0; i < 4 * test.counters; ++i) test.normals[i] = normals[i];
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
