// The gradients of attention on the CPU. Compiled once per instruction set.
//
// A task is a (sample, query head) and a range of columns. It walks through the queries and adds up, with P and dS from
// cpu_score_gradients.h,
//   dv += PT dout    dk += dST q    dq += dS k    and dS along each diagonal, for the relative bias
// in memory of its own: what is shared, by the heads of a group or by the ranges of a head, is added up afterwards, in
// order. The ranges depend on the sizes alone, and so do all sums.
#include "../common/element_types.h"
#include "../common/parallel.h"
#include "cpu_finish_gradients.h"
#include "cpu_score_gradients.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace attention {
namespace {

// Tasks that there should be; a head is cut into ranges of columns only if there are fewer heads.
constexpr int64_t kTasks = 16;

template <typename S>
int64_t ranges_per_head(const Problem& p, const Columns<S>& columns) {
  const int64_t heads = p.batch * p.q_heads;
  const int64_t wanted = heads ? ceil_div(kTasks, heads) : 1;
  const int64_t blocks = gradient_blocks(columns);
  const int64_t ranges = wanted < blocks ? wanted : blocks;
  return ranges > 1 ? ranges : 1;
}

// What the tasks add up; arrays that are not needed are empty.
template <typename S>
struct Sums {
  Sums(const Backward& f, const Columns<S>& columns)
      : columns(columns),
        ranges(ranges_per_head(f, columns)),
        row(round_up(f.width, Vec<S>::kWidth)),
        diagonals(f.dtable.data && f.queries && f.own ? f.queries + f.own - 1 : 0),
        dq(f.needs_dq() ? f.batch * f.q_heads * ranges * f.queries * row : 0),
        dk(f.needs_dk() ? f.batch * f.q_heads * columns.count * row : 0),
        dv(f.needs_dv() ? f.batch * f.q_heads * columns.count * row : 0),
        diagonal(f.batch * f.q_heads * ranges * diagonals) {}

  const Columns<S>& columns;
  const int64_t ranges;
  const int64_t row;
  const int64_t diagonals;
  Buffer<S> dq;        // (sample and head, range, query, row)
  Buffer<S> dk, dv;    // (sample and head, column, row)
  Buffer<S> diagonal;  // (sample and head, range, diagonal)
};

// A block of P or dS as a left factor: with columns as its rows, and for dS also with queries as its rows
template <typename E>
class LeftFactors {
  using S = typename Step<E>::S;
  static constexpr int64_t kRow = kGradientColumns<S>;

 public:
  // Steps over queries
  Left<E> transposed(const S* from, int64_t rows, int64_t n) {
    if constexpr (std::is_same_v<E, S>) {
      return {from, 1, kRow};
    } else {
      narrow_pairs(from, rows, n);
      return {pairs_.data(), 2, 2 * kRow};
    }
  }

  // Steps over columns
  Left<E> plain(const S* from, int64_t rows, int64_t n) {
    if constexpr (std::is_same_v<E, S>) {
      return {from, kRow, 1};
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < n; j += Vec<S>::kWidth) {
          Vec<S>::load(from + i * kRow + j).store(narrowed_.data() + i * kRow + j);
        }
      }
      return {narrowed_.data(), kRow, Step<E>::kTerms};
    }
  }

 private:
  // Two rows beside each other, element by element
  void narrow_pairs([[maybe_unused]] const S* from, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t n) {
#ifdef __AVX512BF16__
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < n; j += 16) {
        const __m512 first = _mm512_loadu_ps(from + i * kRow + j);
        const __m512 second = i + 1 < rows ? _mm512_loadu_ps(from + (i + 1) * kRow + j) : _mm512_setzero_ps();
        const __m512i low = _mm512_cvtepu16_epi32(float_to_bf16(first));
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(float_to_bf16(second)), 16);
        _mm512_storeu_si512(pairs_.data() + i * kRow + 2 * j, _mm512_or_si512(low, high));
      }
    }
#endif
  }

  static constexpr int64_t kSize = std::is_same_v<E, S> ? 0 : kGradientQueries * kRow;
  Buffer<E> pairs_{kSize}, narrowed_{kSize};
};

template <typename T, typename E>
class BackwardTask {
  using S = typename Step<E>::S;
  static constexpr int kTerms = Step<E>::kTerms;
  static constexpr int64_t kPanel = kTileColumns<S> * kTerms;

 public:
  BackwardTask(const Backward& f, Sums<S>& sums)
      : f_(f),
        sums_(sums),
        gradients_(f, sums.columns),
        q_(kGradientQueries * sums.row),
        dout_(kGradientQueries * sums.row) {
    std::memset(static_cast<void*>(q_.data()), 0, kGradientQueries * sums.row * sizeof(E));
    std::memset(static_cast<void*>(dout_.data()), 0, kGradientQueries * sums.row * sizeof(E));
  }

  void run(int64_t head, int64_t range) {
    const int64_t blocks = gradient_blocks(sums_.columns);
    const int64_t begin = range * blocks / sums_.ranges * kGradientColumns<S>;
    int64_t end = (range + 1) * blocks / sums_.ranges * kGradientColumns<S>;
    if (end > sums_.columns.count) end = sums_.columns.count;
    start(head, range, begin, end);
    gradients_.start_head(head / f_.q_heads, head % f_.q_heads, begin, end);
    for (int64_t first = 0; first < f_.queries; first += kGradientQueries) {
      const int64_t rest = f_.queries - first;
      const int64_t rows = rest < kGradientQueries ? rest : kGradientQueries;
      gradients_.start_queries(first, rows);
      if (f_.needs_dk()) interleave(gradients_.q(), q_);
      if (f_.needs_dv()) interleave(gradients_.dout(), dout_);
      for (int64_t column = begin; column < end; column += kGradientColumns<S>) {
        const int64_t n = end - column < kGradientColumns<S> ? end - column : kGradientColumns<S>;
        gradients_.compute(column, n);
        add_block(first, rows, column, n);
      }
    }
  }

 private:
  void start(int64_t head, int64_t range, int64_t begin, int64_t end) {
    head_ = head;
    const int64_t task = head * sums_.ranges + range;
    dq_ = sums_.dq.data() + task * f_.queries * sums_.row;
    dk_ = sums_.dk.data() + head * sums_.columns.count * sums_.row;
    dv_ = sums_.dv.data() + head * sums_.columns.count * sums_.row;
    diagonal_ = sums_.diagonal.data() + task * sums_.diagonals;
    const int64_t from = begin * sums_.row;
    const int64_t count = (end - begin) * sums_.row;
    if (f_.needs_dq()) std::memset(dq_, 0, f_.queries * sums_.row * sizeof(S));
    if (f_.needs_dk()) std::memset(dk_ + from, 0, count * sizeof(S));
    if (f_.needs_dv()) std::memset(dv_ + from, 0, count * sizeof(S));
    std::memset(diagonal_, 0, sums_.diagonals * sizeof(S));
  }

  void interleave(const E* from, Buffer<E>& to) {
    for (int64_t i = 0; i < kGradientQueries; i += Vec<S>::kWidth) {
      interleave_rows(from + i * f_.width, f_.width, f_.width, to.data() + i * sums_.row, sums_.row * kTerms);
    }
  }

  void add_block(int64_t first, int64_t rows, int64_t column, int64_t n) {
    const int64_t row = sums_.row;
    const int64_t steps = ceil_div(rows, kTerms);
    if (f_.needs_dv()) {
      const Left<E> weights = factors_.transposed(gradients_.weights(), rows, n);
      multiply<E, Store::kAdded>(weights, {dout_.data(), row * kTerms}, kPanel, {dv_ + column * row, row}, n, f_.width,
                                 steps);
    }
    if (f_.needs_dk()) {
      const Left<E> dscores = factors_.transposed(gradients_.dscores(), rows, n);
      multiply<E, Store::kAdded>(dscores, {q_.data(), row * kTerms}, kPanel, {dk_ + column * row, row}, n, f_.width,
                                 steps);
    }
    if (f_.needs_dq()) {
      const Left<E> dscores = factors_.plain(gradients_.dscores(), rows, n);
      multiply<E, Store::kAdded>(dscores, gradients_.keys().width_in_columns(column), kPanel, {dq_ + first * row, row},
                                 rows, f_.width, n / kTerms);
    }
    if (sums_.diagonals || writes_dbias()) add_dscores(first, rows, column, n);
  }

  bool writes_dbias() const { return f_.dbias.data && f_.has_bias_of_each_score(); }

  void add_dscores(int64_t first, int64_t rows, int64_t column, int64_t n) {
    for (int64_t r = 0; r < rows; ++r) {
      const S* const dscores = gradients_.dscores() + r * kGradientColumns<S>;
      const int64_t i = first + r;
      for_each_segment(sums_.columns, column, n, [&](bool own, int64_t at, int64_t key, int64_t count) {
        if (sums_.diagonals && own) add_row(dscores + at, count, diagonal_ + diagonal(f_, i, key));
        if (writes_dbias()) {
          write_row(f_.dbias, ((head_ * f_.queries) + i) * f_.keys() + key, dscores + at, count);
        }
      });
    }
  }

  const Backward& f_;
  Sums<S>& sums_;
  ScoreGradients<T, E> gradients_;
  LeftFactors<E> factors_;
  Buffer<E> q_, dout_;  // as right factors whose steps are queries
  int64_t head_ = 0;
  S *dq_ = nullptr, *dk_ = nullptr, *dv_ = nullptr, *diagonal_ = nullptr;
};

// Sums of (count, width), in order
template <typename S>
void finish_scale(const ParameterGradient& gradient, Buffer<S>& sums, int64_t count, int64_t width) {
  if (!gradient.data) return;
  for (int64_t d = 0; d < width; ++d) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += sums[i * width + d];
    write(gradient, d, total);
  }
}

template <typename T, typename S>
void finish_dq(const Backward& f, Sums<S>& sums) {
  if (!f.needs_dq()) return;
  WidthScale<S> scale(f.q_scale, f.width);
  const Finish finish{f.batch, f.q_heads, f.queries, f.width, 0, f.scale, f.q, f.dq};
  Buffer<S> dscale(finish_units(finish) * f.width);
  const int64_t array = f.queries * sums.row;
  finish_gradients<T>(finish, {sums.dq.data(), sums.ranges, array, sums.ranges * array, sums.row}, scale.data(),
                      dscale.data());
  finish_scale(f.dq_scale, dscale, finish_units(finish), f.width);
}

template <typename T, typename S>
void finish_dk_and_dv(const Backward& f, Sums<S>& sums) {
  const int64_t group = f.q_heads / f.kv_heads;
  const int64_t array = sums.columns.count * sums.row;
  const auto segment = [&](int s, double factor, const HeadRows& x, const HeadOutput& dx) {
    return Finish{f.batch, f.kv_heads, sums.columns.segment[s].count, f.width, sums.columns.segment[s].column, factor,
                  x,       dx};
  };
  const auto partials = [&](Buffer<S>& from) {
    return Partials<S>{from.data(), group, array, group * array, sums.row};
  };
  if (f.needs_dv()) {
    const S* const no_scale = nullptr;
    const auto finish = [&](int s, const HeadOutput& dx) {
      if (dx.data) finish_gradients<T>(segment(s, 1, {}, dx), partials(sums.dv), no_scale, static_cast<S*>(nullptr));
    };
    finish(0, f.dcontext_v);
    finish(1, f.dv);
  }
  if (!f.needs_dk()) return;
  WidthScale<S> scale(f.k_scale, f.width);
  const Finish context = segment(0, f.scale, f.context_k, f.dcontext_k);
  const Finish own = segment(1, f.scale, f.k, f.dk);
  const int64_t units = finish_units(context) + finish_units(own);
  Buffer<S> dscale(units * f.width);
  finish_gradients<T>(context, partials(sums.dk), scale.data(), dscale.data());
  finish_gradients<T>(own, partials(sums.dk), scale.data(), dscale.data() + finish_units(context) * f.width);
  finish_scale(f.dk_scale, dscale, units, f.width);
}

// Diagonals are folded into buckets, samples and ranges in order.
template <typename S>
void finish_dtable(const Backward& f, Sums<S>& sums) {
  if (!f.dtable.data) return;
  const int64_t per_sample = f.q_heads * sums.ranges * sums.diagonals;
  Buffer<double> total(f.relative.rows);
  for (int64_t h = 0; h < f.q_heads; ++h) {
    for (int64_t r = 0; r < f.relative.rows; ++r) total[r] = 0;
    for (int64_t i = 0; i < sums.diagonals; ++i) {
      for (int64_t b = 0; b < f.batch; ++b) {
        for (int64_t c = 0; c < sums.ranges; ++c) {
          total[f.relative.bucket[i]] += sums.diagonal[b * per_sample + (h * sums.ranges + c) * sums.diagonals + i];
        }
      }
    }
    for (int64_t r = 0; r < f.relative.rows; ++r) write(f.dtable, r * f.q_heads + h, total[r]);
  }
}

template <typename T, typename E>
void run(const Backward& f) {
  using S = typename Step<E>::S;
  const Columns<S> columns(f);
  Sums<S> sums(f, columns);
  const int64_t tasks = f.batch * f.q_heads * sums.ranges;
  const int64_t scores = f.queries * f.keys() / sums.ranges + 1;
  parallel_for(tasks, scores, [&](int64_t begin, int64_t end) {
    BackwardTask<T, E> task(f, sums);
    for (int64_t i = begin; i < end; ++i) task.run(i / sums.ranges, i % sums.ranges);
  });
  finish_dq<T>(f, sums);
  finish_dk_and_dv<T>(f, sums);
  finish_dtable(f, sums);
}

}  // namespace
}  // namespace attention

void attention_backward(const attention::Backward& f) {
  using namespace attention;
  with_element_type(f.dtype, [&](auto element) { run<decltype(element), FactorType<decltype(element)>>(f); });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
