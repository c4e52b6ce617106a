// A 3x3 convolution by Winograd's minimal filtering, in float32: Lavin and Gray, "Fast algorithms for convolutional
// neural networks", 2015. A tile of results takes fewer multiplications for each pair of channels: with F(4x4, 3x3) 36
// instead of 144, with F(2x2, 3x3) 16 instead of 36. The larger tile rounds more, which 16-bit results do not show:
// where a processor multiplies 16-bit numbers at most twice as fast as float32 (all without matrix tiles) that is the
// shorter way for them. The smaller one is as accurate as the sum of all products, and serves float32. Transforms and
// sums are in float32, so that nothing is lost to 16 bits.
//
//   V = B^T d B     the input of a tile, of every input channel: rows of a matrix for each of its points
//   M = V U         for each point; U = G g G^T is what the weights were transformed to
//   y = A^T M A     the results of a tile, of every output channel
//
// Channels lie in the lanes. Compiled once per instruction set.
#include "../attention/cpu_matmul.h"
#include "../common/buffer.h"
#include "../common/parallel.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace {

using imagen_fast::conv3x3::kPanelColumns;
using imagen_fast::conv3x3::points_of;
using V = Vec<float>;

constexpr int64_t kChannelsOfSum = 64;        // terms of one of the shorter sums
constexpr int64_t kFewestTiles = 30;          // of a chunk: weights are read once for each chunk
constexpr int64_t kChunkFloats = 256 * 1024;  // V and M of a chunk stay in the cache of a core

// F(2, 3)
struct Two {
  static constexpr int kEdge = 2;

  // B^T of a column
  static IMAGEN_FAST_INLINE void transform_input(const V (&d)[4], V (&to)[4]) {
    to[0] = d[0] - d[2];
    to[1] = d[1] + d[2];
    to[2] = d[2] - d[1];
    to[3] = d[1] - d[3];
  }

  // A^T of a column
  static IMAGEN_FAST_INLINE void transform_output(const V (&m)[4], V (&to)[2]) {
    to[0] = m[0] + (m[1] + m[2]);
    to[1] = (m[1] - m[2]) - m[3];
  }
};

// F(4, 3)
struct Four {
  static constexpr int kEdge = 4;

  static IMAGEN_FAST_INLINE void transform_input(const V (&d)[6], V (&to)[6]) {
    const V a = fma(V(-4), d[2], d[4]), b = fma(V(-4), d[1], d[3]);
    const V c = d[4] - d[2], e = V(2) * (d[3] - d[1]);
    to[0] = fma(V(4), d[0], fma(V(-5), d[2], d[4]));
    to[1] = a + b;
    to[2] = a - b;
    to[3] = c + e;
    to[4] = c - e;
    to[5] = fma(V(4), d[1], fma(V(-5), d[3], d[5]));
  }

  static IMAGEN_FAST_INLINE void transform_output(const V (&m)[6], V (&to)[4]) {
    const V sum1 = m[1] + m[2], difference1 = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    to[0] = m[0] + sum1 + sum2;
    to[1] = fma(V(2), difference2, difference1);
    to[2] = fma(V(4), sum2, sum1);
    to[3] = fma(V(8), difference2, difference1) + m[5];
  }
};

struct Tiling {
  int64_t edge;  // of a tile's results
  int64_t rows;  // of tiles in a picture
  int64_t columns;
  int64_t tiles;   // in all
  int64_t panels;  // of kPanelColumns output channels
  int64_t chunk;   // tiles that go through the three steps together
};

Tiling tiling_of(const imagen_fast::conv3x3::Problem& p) {
  Tiling t{};
  t.edge = p.edge;
  t.rows = ceil_div(p.height, t.edge);
  t.columns = ceil_div(p.width, t.edge);
  t.tiles = p.batch * t.rows * t.columns;
  t.panels = ceil_div(p.out_channels, kPanelColumns);
  const int64_t fitting = kChunkFloats / (points_of(t.edge) * (p.in_channels + kPanelColumns));
  const int64_t most = fitting > kFewestTiles ? fitting : kFewestTiles;
  const int64_t threads = imagen_fast::num_threads();
  t.chunk = ceil_div(t.tiles, threads * ceil_div(t.tiles, threads * most));
  return t;
}

struct Tile {
  int64_t sample, top, left;  // of its results
};

Tile tile_at(const Tiling& t, int64_t i) {
  return {i / (t.rows * t.columns), i / t.columns % t.rows * t.edge, i % t.columns * t.edge};
}

// v: (points, chunk, in_channels), at the row of this tile
template <typename T, typename Filter>
void transform_input(const imagen_fast::conv3x3::Problem& p, Tile tile, float* v, int64_t chunk) {
  const T* picture = static_cast<const T*>(p.x) + tile.sample * p.height * p.width * p.in_channels;
  const int64_t point = chunk * p.in_channels;
  constexpr int kSide = Filter::kEdge + 2;
  for (int64_t c = 0; c < p.in_channels; c += V::kWidth) {
    V half[kSide][kSide];  // B^T d
    for (int j = 0; j < kSide; ++j) {
      const int64_t column = tile.left + j - 1;
      V d[kSide], to[kSide];
      for (int i = 0; i < kSide; ++i) {
        const int64_t row = tile.top + i - 1;
        const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
        d[i] = inside ? V::load(picture + (row * p.width + column) * p.in_channels + c) : V(0);
      }
      Filter::transform_input(d, to);
      for (int i = 0; i < kSide; ++i) half[i][j] = to[i];
    }
    for (int i = 0; i < kSide; ++i) {
      V to[kSide];
      Filter::transform_input(half[i], to);
      for (int j = 0; j < kSide; ++j) to[j].store(v + (i * kSide + j) * point + c);
    }
  }
}

// m: (points, chunk, kPanelColumns), at the row of this tile, of output channels from `first` on
template <typename T, typename Filter>
void transform_output(const imagen_fast::conv3x3::Problem& p, const Tiling& t, Tile tile, const float* m, int64_t first,
                      int64_t columns) {
  const int64_t point = t.chunk * kPanelColumns;
  constexpr int kEdge = Filter::kEdge, kSide = kEdge + 2;
  for (int64_t column = 0; column < columns; column += V::kWidth) {
    const int64_t c = first + column;
    const float* from = m + column;
    V half[kEdge][kSide];  // A^T M
    for (int j = 0; j < kSide; ++j) {
      V products[kSide], to[kEdge];
      for (int i = 0; i < kSide; ++i) products[i] = V::load(from + (i * kSide + j) * point);
      Filter::transform_output(products, to);
      for (int i = 0; i < kEdge; ++i) half[i][j] = to[i];
    }
    const V bias = p.bias ? V::load(static_cast<const T*>(p.bias) + c) : V(0);
    for (int i = 0; i < kEdge && tile.top + i < p.height; ++i) {
      V to[kEdge];
      Filter::transform_output(half[i], to);
      for (int j = 0; j < kEdge && tile.left + j < p.width; ++j) {
        const int64_t pixel = (tile.sample * p.height + tile.top + i) * p.width + tile.left + j;
        const int64_t at = pixel * p.out_channels + c;
        V result = to[j] + bias;
        if (p.add) result = result + V::load(static_cast<const T*>(p.add) + at);
        result.store(static_cast<T*>(p.y) + at);
      }
    }
  }
}

// M = V U of one point. The sum over input channels is made of shorter sums: less is rounded away, and the weights of
// each stay in the cache for all tiles.
void multiply_point(attention::Left<float> v, attention::Right<float> u, attention::Result<float> m, int64_t tiles,
                    int64_t columns, int64_t in_channels) {
  for (int64_t c = 0; c < in_channels; c += kChannelsOfSum) {
    const int64_t left = in_channels - c, steps = left < kChannelsOfSum ? left : kChannelsOfSum;
    const attention::Left<float> a{v.data + c, v.row, v.step};
    const attention::Right<float> b{u.data + c * kPanelColumns, u.step};
    constexpr int64_t kPanel = attention::kTileColumns<float>;
    if (c == 0) {
      attention::multiply<float, attention::Store::kScaled>(a, b, kPanel, m, tiles, columns, steps);
    } else {
      attention::multiply<float, attention::Store::kSummed>(a, b, kPanel, m, tiles, columns, steps);
    }
  }
}

template <typename T, typename Filter>
void convolve(const imagen_fast::conv3x3::Problem& p) {
  constexpr int64_t kPoints = points_of(Filter::kEdge);
  const Tiling t = tiling_of(p);
  const int64_t chunks = ceil_div(t.tiles, t.chunk);
  parallel_for(chunks, kElementsPerThread, [&](int64_t begin, int64_t end) {
    Buffer<float> transformed(kPoints * t.chunk * p.in_channels), products(kPoints * t.chunk * kPanelColumns);
    float* const v = transformed.data();
    float* const m = products.data();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * t.chunk;
      const int64_t tiles = t.tiles - first < t.chunk ? t.tiles - first : t.chunk;
      for (int64_t i = 0; i < tiles; ++i) {
        transform_input<T, Filter>(p, tile_at(t, first + i), v + i * p.in_channels, t.chunk);
      }
      for (int64_t panel = 0; panel < t.panels; ++panel) {
        const int64_t left_columns = p.out_channels - panel * kPanelColumns;
        const int64_t columns = left_columns < kPanelColumns ? left_columns : kPanelColumns;
        for (int64_t point = 0; point < kPoints; ++point) {
          multiply_point({v + point * t.chunk * p.in_channels, p.in_channels, 1},
                         {p.weight + (point * t.panels + panel) * p.in_channels * kPanelColumns, kPanelColumns},
                         {m + point * t.chunk * kPanelColumns, kPanelColumns}, tiles, columns, p.in_channels);
        }
        for (int64_t i = 0; i < tiles; ++i) {
          transform_output<T, Filter>(p, t, tile_at(t, first + i), m + i * kPanelColumns, panel * kPanelColumns,
                                      columns);
        }
      }
    }
  });
}

template <typename T>
void convolve_by_edge(const imagen_fast::conv3x3::Problem& p) {
  if (p.edge == Two::kEdge) return convolve<T, Two>(p);
  convolve<T, Four>(p);
}

}  // namespace

void conv3x3(const imagen_fast::conv3x3::Problem& p) {
  if (p.dtype == DType::kHalf) return convolve_by_edge<Half>(p);
  if (p.dtype == DType::kBFloat16) return convolve_by_edge<BFloat16>(p);
  convolve_by_edge<float>(p);
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
