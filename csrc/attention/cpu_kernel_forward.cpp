// Attention on the CPU. Compiled once per instruction set.
//
// Flash attention (Dao et al., 2022, arXiv:2205.14135): the scores of a block of queries with a block of keys never
// leave the cache. With m the largest score that a query has met so far, it carries
//   sum = sum_j exp(s_j - m)     acc = sum_j exp(s_j - m) v_j
// and multiplies both by exp(m - m') when a block raises m to m'. Keys and values are packed once per (sample, key
// head) and thread. What a query adds up, and in which order, depends neither on its block nor on the number of
// threads.
#include "../common/element_types.h"
#include "../common/parallel.h"
#include "cpu_scores.h"
#include "cpu_tiles.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace attention {
namespace {

// Queries to a block, and columns: their scores should fit the first-level cache, or nearly.
constexpr int64_t kQueries = 8 * kTileRows;
template <typename S>
constexpr int64_t kColumns = 4 * kTileColumns<S>;

// How matrices are multiplied: by vectors, or by the tiles of cpu_tiles.h, all of whose sizes are multiples of 16.
template <typename E>
struct ByVectors {
  using Element = E;
  static constexpr int64_t kRows = 1;
  static constexpr int64_t kSteps = 1;

  void scores(Left<E> a, Right<E> b, int64_t panel, Result<typename Step<E>::S> c, int64_t rows, int64_t columns,
              int64_t steps, typename Step<E>::S scale) {
    multiply<E, Store::kScaled>(a, b, panel, c, rows, columns, steps, scale);
  }
  void add(Left<E> a, Right<E> b, int64_t panel, Result<typename Step<E>::S> c, int64_t rows, int64_t columns,
           int64_t steps) {
    multiply<E, Store::kAdded>(a, b, panel, c, rows, columns, steps);
  }
};

#ifdef __AVX512BF16__
template <typename Tiles>
struct ByTiles {
  using Element = BFloat16;
  static constexpr int64_t kRows = kTileSide;
  static constexpr int64_t kSteps = kTileSide;

  void scores(Left<BFloat16> a, Right<BFloat16> b, int64_t panel, Result<float> c, int64_t rows, int64_t columns,
              int64_t steps, float scale) {
    multiply_in_tiles<Store::kScaled>(tiles, a, b, panel, c, rows, columns, steps);
    for (int64_t i = 0; i < rows; ++i) multiply_row(c.data + i * c.row, scale, columns);
  }
  void add(Left<BFloat16> a, Right<BFloat16> b, int64_t panel, Result<float> c, int64_t rows, int64_t columns,
           int64_t steps) {
    multiply_in_tiles<Store::kAdded>(tiles, a, b, panel, c, rows, columns, steps);
  }

  Tiles tiles;
};
#endif

// T is the type in memory.
template <typename T, typename Products>
class ForwardTask {
  using E = typename Products::Element;
  using S = typename Step<E>::S;
  static constexpr int kTerms = Step<E>::kTerms;

 public:
  ForwardTask(const Forward& f, int64_t block)
      : f_(f),
        block_(block),
        columns_(f, kTerms * Products::kSteps < Vec<S>::kWidth ? Vec<S>::kWidth : kTerms * Products::kSteps),
        depth_(round_up(f.width, kTerms * Products::kSteps)),
        row_(round_up(f.width, Vec<S>::kWidth)),
        q_scale_(f.q_scale, f.width),
        k_scale_(f.k_scale, f.width),
        additions_(f, columns_),
        keys_(columns_, f.width, depth_, true, false),
        values_(columns_, f.width, f.width, false, true),
        q_(block * depth_),
        scores_(block * kColumns<S>),
        sums_(block * row_) {
    std::memset(static_cast<void*>(q_.data()), 0, block * depth_ * sizeof(E));
  }

  // Queries [first, first + rows) of head h; heads and samples come in ascending order
  void run(int64_t b, int64_t h, int64_t first, int64_t rows) {
    start(b, h);
    const T* const q = static_cast<const T*>(f_.q.data) + b * f_.q.stride_b + h * f_.q.stride_h + first * f_.q.stride_l;
    load_rows(q, f_.q.stride_l, rows, rows, f_.width, q_scale_.data(), q_.data(), depth_);
    for (int64_t i = 0; i < rows; ++i) state_[i] = {-kInfinity<S>, 0};
    for (int64_t i = 0; i < round_up(rows, Products::kRows) * row_; ++i) sums_[i] = 0;
    for (int64_t column = 0; column < columns_.count; column += kColumns<S>) {
      const int64_t rest = columns_.count - column;
      attend(first, rows, column, rest < kColumns<S> ? rest : kColumns<S>);
    }
    finish(first, rows);
  }

 private:
  struct State {
    S most;
    S sum;
  };

  void start(int64_t b, int64_t h) {
    const int64_t kv_head = h / (f_.q_heads / f_.kv_heads);
    if (b != b_ || kv_head != kv_head_) {
      keys_.template pack<T>(f_.context_k, f_.k, b, kv_head, k_scale_.data());
      values_.template pack<T>(f_.context_v, f_.v, b, kv_head, nullptr);
    }
    if (b != b_) additions_.start_sample(b);
    if (b != b_ || h != h_) additions_.start_head(h);
    b_ = b;
    h_ = h;
    kv_head_ = kv_head;
  }

  void attend(int64_t first, int64_t rows, int64_t column, int64_t n) {
    const Result<S> scores{scores_.data(), kColumns<S>};
    const int64_t all_rows = round_up(rows, Products::kRows);
    products_.scores({q_.data(), depth_, kTerms}, keys_.keys_in_columns(column), keys_.panel(), scores, all_rows, n,
                     depth_ / kTerms, static_cast<S>(f_.scale));
    for (int64_t i = 0; i < rows; ++i) {
      S* const row = scores.data + i * scores.row;
      additions_.add(first + i, column, n, row);
      update(i, row, n);
    }
    // The weights lie at the beginning of their scores' rows.
    const int64_t weights_row = kColumns<S> * static_cast<int64_t>(sizeof(S) / sizeof(E));
    const Left<E> weights{reinterpret_cast<const E*>(scores.data), weights_row, kTerms};
    products_.add(weights, values_.width_in_columns(column), kTileColumns<S> * kTerms, {sums_.data(), row_}, all_rows,
                  f_.width, n / kTerms);
  }

  // From a row of scores to weights
  IMAGEN_FAST_INLINE void update(int64_t i, S* row, int64_t n) {
    State& state = state_[i];
    const S most_here = largest(row, n);
    const S most = most_here > state.most ? most_here : state.most;
    const S finite = most == -kInfinity<S> ? S(0) : most;  // nothing to attend to so far
    if (most > state.most) {
      const S correction = std::exp(state.most - finite);
      state.sum *= correction;
      multiply_row(sums_.data() + i * row_, correction, row_);
    }
    state.most = most;
    state.sum += exponentials<T>(row, finite, n, reinterpret_cast<E*>(row));
  }

  void finish(int64_t first, int64_t rows) {
    T* out = static_cast<T*>(f_.out.data) + b_ * f_.out.stride_b + h_ * f_.out.stride_h + first * f_.out.stride_l;
    S* const lse = static_cast<S*>(f_.lse) + (b_ * f_.q_heads + h_) * f_.queries + first;
    for (int64_t i = 0; i < rows; ++i, out += f_.out.stride_l) {
      const S* const row = sums_.data() + i * row_;
      const State& state = state_[i];
      const S inverse = state.sum == 0 ? S(0) : 1 / state.sum;
      for_each_vector<S>(f_.width, [&](int64_t d, auto lanes) {
        using V = typename decltype(lanes)::V;
        store(load(row + d, lanes) * V(inverse), out + d, lanes);
      });
      lse[i] = state.sum == 0 ? -kInfinity<S> : state.most + std::log(state.sum);
    }
  }

  const Forward& f_;
  const int64_t block_;
  const Columns<S> columns_;
  const int64_t depth_;  // D filled up to whole steps
  const int64_t row_;    // D filled up to whole vectors
  Products products_;
  WidthScale<S> q_scale_, k_scale_;
  Additions<S> additions_;
  Packed<E> keys_, values_;
  Buffer<E> q_;
  Buffer<S> scores_, sums_;
  State state_[kQueries];
  int64_t b_ = -1;
  int64_t h_ = -1;
  int64_t kv_head_ = -1;
};

// Queries to a block: fewer where threads would go idle
int64_t queries_per_block(const Problem& p, int64_t multiple) {
  int64_t block = kQueries;
  while (block > kTileRows && p.batch * p.q_heads * ceil_div(p.queries, block) < 4 * num_threads()) block /= 2;
  return round_up(block, multiple);
}

template <typename T, typename Products>
void run(const Forward& f) {
  const int64_t block = queries_per_block(f, Products::kRows == 1 ? kTileRows : Products::kRows);
  const int64_t blocks = ceil_div(f.queries, block);
  parallel_for(f.batch * f.q_heads * blocks, block * (f.keys() + 1), [&](int64_t begin, int64_t end) {
    ForwardTask<T, Products> task(f, block);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks;
      const int64_t first = i % blocks * block;
      const int64_t rest = f.queries - first;
      task.run(head / f.q_heads, head % f.q_heads, first, rest < block ? rest : block);
    }
  });
}

}  // namespace
}  // namespace attention

void attention_forward(const attention::Forward& f) {
  using namespace attention;
  with_element_type(f.dtype, [&](auto element) {
    using T = decltype(element);
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (f.matrix_tiles == MatrixTiles::kHardware) return run<T, ByTiles<HardwareTiles>>(f);
      if (f.matrix_tiles == MatrixTiles::kEmulated) return run<T, ByTiles<EmulatedTiles>>(f);
    }
#endif
    run<T, ByVectors<FactorType<T>>>(f);
  });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
