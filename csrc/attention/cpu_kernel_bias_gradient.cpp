// The gradient of a bias that several scores share, on the CPU. Compiled once per instruction set.
//
// A task has a part of the bias to itself, computes the gradients of all scores that share it, once more, and adds them
// up in order: samples, heads, queries. That takes no memory beyond the part, where sums across the tasks of
// cpu_kernel_backward.cpp would take a copy of the bias for each of them.
#include "../common/element_types.h"
#include "../common/parallel.h"
#include "cpu_score_gradients.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace attention {
namespace {

template <typename T, typename E>
class BiasGradientTask {
  using S = typename Step<E>::S;
  static constexpr int64_t kRow = kGradientColumns<S>;

 public:
  BiasGradientTask(const Backward& f, const Columns<S>& columns, bool per_query)
      : f_(f),
        columns_(columns),
        gradients_(f, columns),
        sums_(per_query ? kGradientQueries * columns.count : 0),
        block_(per_query ? 0 : kRow),
        totals_(per_query ? 0 : kRow) {}

  // All keys of a block of queries, for one (sample, head) of the bias
  void run_queries(int64_t b, int64_t h, int64_t first) {
    const int64_t rest = f_.queries - first;
    const int64_t rows = rest < kGradientQueries ? rest : kGradientQueries;
    for (int64_t i = 0; i < rows * columns_.count; ++i) sums_[i] = 0;
    for_each_head(b, h, 0, columns_.count, [&] {
      gradients_.start_queries(first, rows);
      for (int64_t column = 0; column < columns_.count; column += kRow) {
        const int64_t n = length_of_block(column);
        gradients_.compute(column, n);
        for (int64_t i = 0; i < rows; ++i) {
          add_row(gradients_.dscores() + i * kRow, n, sums_.data() + i * columns_.count + column);
        }
      }
    });
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = (b * f_.dbias.heads + h) * f_.dbias.queries + first + i;
      for (const auto& segment : columns_.segment) {
        write_row(f_.dbias, row * f_.dbias.keys + segment.key, sums_.data() + i * columns_.count + segment.column,
                  segment.count);
      }
    }
  }

  // All queries of a block of keys, where they share the bias
  void run_keys(int64_t b, int64_t h, int64_t column) {
    const int64_t n = length_of_block(column);
    for (int64_t j = 0; j < n; ++j) totals_[j] = 0;
    for_each_head(b, h, column, column + n, [&] {
      for (int64_t first = 0; first < f_.queries; first += kGradientQueries) {
        const int64_t rest = f_.queries - first;
        const int64_t rows = rest < kGradientQueries ? rest : kGradientQueries;
        gradients_.start_queries(first, rows);
        gradients_.compute(column, n);
        for (int64_t j = 0; j < n; ++j) block_[j] = 0;
        for (int64_t i = 0; i < rows; ++i) add_row(gradients_.dscores() + i * kRow, n, block_.data());
        for (int64_t j = 0; j < n; ++j) totals_[j] += block_[j];
      }
    });
    for (int64_t j = 0; j < n; ++j) block_[j] = static_cast<S>(totals_[j]);
    for_each_segment(columns_, column, n, [&](bool, int64_t at, int64_t key, int64_t count) {
      write_row(f_.dbias, (b * f_.dbias.heads + h) * f_.dbias.keys + key, block_.data() + at, count);
    });
  }

 private:
  int64_t length_of_block(int64_t column) const {
    return columns_.count - column < kRow ? columns_.count - column : kRow;
  }

  // For all samples and heads that share (b, h) of the bias
  template <typename Body>
  void for_each_head(int64_t b, int64_t h, int64_t begin, int64_t end, Body&& body) {
    const bool one_sample = f_.dbias.batch == f_.batch, one_head = f_.dbias.heads == f_.q_heads;
    for (int64_t sample = one_sample ? b : 0; sample < (one_sample ? b + 1 : f_.batch); ++sample) {
      for (int64_t head = one_head ? h : 0; head < (one_head ? h + 1 : f_.q_heads); ++head) {
        gradients_.start_head(sample, head, begin, end);
        body();
      }
    }
  }

  const Backward& f_;
  const Columns<S>& columns_;
  ScoreGradients<T, E> gradients_;
  Buffer<S> sums_;         // (query, column)
  Buffer<S> block_;        // (column,), over a block of queries
  Buffer<double> totals_;  // (column,), over all
};

template <typename T, typename E>
void run(const Backward& f) {
  using S = typename Step<E>::S;
  const BiasGradient& bias = f.dbias;
  const Columns<S> columns(f);
  if (bias.keys != f.keys()) {
    // Weights do not change with what is added to all scores of a query.
    const int64_t size = bias.dtype == DType::kDouble ? 8 : bias.dtype == DType::kFloat ? 4 : 2;
    std::memset(bias.data, 0, bias.batch * bias.heads * bias.queries * bias.keys * size);
    return;
  }
  const bool per_query = bias.queries == f.queries;
  const int64_t blocks = per_query ? ceil_div(f.queries, kGradientQueries) : gradient_blocks(columns);
  const int64_t tasks = bias.batch * bias.heads * blocks;
  parallel_for(tasks, f.batch * f.q_heads * f.queries * f.keys() / (tasks + 1) + 1, [&](int64_t begin, int64_t end) {
    BiasGradientTask<T, E> task(f, columns, per_query);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks / bias.heads, h = i / blocks % bias.heads;
      if (per_query) {
        task.run_queries(b, h, i % blocks * kGradientQueries);
      } else {
        task.run_keys(b, h, i % blocks * kGradientColumns<S>);
      }
    }
  });
}

}  // namespace
}  // namespace attention

void attention_bias_gradient(const attention::Backward& f) {
  using namespace attention;
  with_element_type(f.dtype, [&](auto element) { run<decltype(element), FactorType<decltype(element)>>(f); });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
