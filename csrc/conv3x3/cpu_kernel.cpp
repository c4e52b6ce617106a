// A 3x3 convolution in fp16 and bf16 by Winograd's minimal filtering F(4x4, 3x3), in float32: Lavin and Gray, "Fast
// algorithms for convolutional neural networks", 2015. A tile of 4x4 results takes 36 multiplications for each pair of
// channels instead of 144, and where a processor multiplies 16-bit numbers at most twice as fast as float32 (all
// without matrix tiles) that is the shorter way. Transforms and sums are in float32, so that nothing is lost to 16
// bits.
//
//   V = B^T d B     the 6x6 input of a tile, of every input channel: rows of a matrix for each of 36 points
//   M = V U         for each point; U = G g G^T is what the weights were transformed to
//   y = A^T M A     4x4 results, of every output channel
//
// Channels lie in the lanes. Compiled once per instruction set.
#include "../attention/cpu_matmul.h"
#include "../common/buffer.h"
#include "../common/parallel.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace {

using imagen_fast::conv3x3::kPanelColumns;
using imagen_fast::conv3x3::kPoints;
using V = Vec<float>;

constexpr int64_t kFewestTiles = 30;          // of a chunk: weights are read once for each chunk
constexpr int64_t kChunkFloats = 256 * 1024;  // V and M of a chunk stay in the cache of a core

struct Tiling {
  int64_t rows;  // of tiles in a picture
  int64_t columns;
  int64_t tiles;   // in all
  int64_t panels;  // of kPanelColumns output channels
  int64_t chunk;   // tiles that go through the three steps together
};

Tiling tiling_of(const imagen_fast::conv3x3::Problem& p) {
  Tiling t{};
  t.rows = ceil_div(p.height, 4);
  t.columns = ceil_div(p.width, 4);
  t.tiles = p.batch * t.rows * t.columns;
  t.panels = ceil_div(p.out_channels, kPanelColumns);
  const int64_t fitting = kChunkFloats / (kPoints * (p.in_channels + kPanelColumns));
  const int64_t most = fitting > kFewestTiles ? fitting : kFewestTiles;
  const int64_t threads = imagen_fast::num_threads();
  t.chunk = ceil_div(t.tiles, threads * ceil_div(t.tiles, threads * most));
  return t;
}

struct Tile {
  int64_t sample, top, left;  // of its results
};

Tile tile_at(const Tiling& t, int64_t i) {
  return {i / (t.rows * t.columns), i / t.columns % t.rows * 4, i % t.columns * 4};
}

// B^T of six numbers
IMAGEN_FAST_INLINE void transform_six(const V (&d)[6], V (&to)[6]) {
  const V a = fma(V(-4), d[2], d[4]), b = fma(V(-4), d[1], d[3]);
  const V c = d[4] - d[2], e = V(2) * (d[3] - d[1]);
  to[0] = fma(V(4), d[0], fma(V(-5), d[2], d[4]));
  to[1] = a + b;
  to[2] = a - b;
  to[3] = c + e;
  to[4] = c - e;
  to[5] = fma(V(4), d[1], fma(V(-5), d[3], d[5]));
}

// A^T of six numbers
IMAGEN_FAST_INLINE void transform_to_four(const V (&m)[6], V (&to)[4]) {
  const V sum1 = m[1] + m[2], difference1 = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  to[0] = m[0] + sum1 + sum2;
  to[1] = fma(V(2), difference2, difference1);
  to[2] = fma(V(4), sum2, sum1);
  to[3] = fma(V(8), difference2, difference1) + m[5];
}

// v: (kPoints, chunk, in_channels), at the row of this tile
template <typename T>
void transform_input(const imagen_fast::conv3x3::Problem& p, Tile tile, float* v, int64_t chunk) {
  const T* picture = static_cast<const T*>(p.x) + tile.sample * p.height * p.width * p.in_channels;
  const int64_t point = chunk * p.in_channels;
  for (int64_t c = 0; c < p.in_channels; c += V::kWidth) {
    V half[6][6];  // B^T d
    for (int j = 0; j < 6; ++j) {
      const int64_t column = tile.left + j - 1;
      V d[6], to[6];
      for (int i = 0; i < 6; ++i) {
        const int64_t row = tile.top + i - 1;
        const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
        d[i] = inside ? V::load(picture + (row * p.width + column) * p.in_channels + c) : V(0);
      }
      transform_six(d, to);
      for (int i = 0; i < 6; ++i) half[i][j] = to[i];
    }
    for (int i = 0; i < 6; ++i) {
      V to[6];
      transform_six(half[i], to);
      for (int j = 0; j < 6; ++j) to[j].store(v + (i * 6 + j) * point + c);
    }
  }
}

// m: (kPoints, chunk, kPanelColumns), at the row of this tile, of output channels from `first` on
template <typename T>
void transform_output(const imagen_fast::conv3x3::Problem& p, const Tiling& t, Tile tile, const float* m, int64_t first,
                      int64_t columns) {
  const int64_t point = t.chunk * kPanelColumns;
  for (int64_t column = 0; column < columns; column += V::kWidth) {
    const int64_t c = first + column;
    const float* from = m + column;
    V half[4][6];  // A^T M
    for (int j = 0; j < 6; ++j) {
      V six[6], to[4];
      for (int i = 0; i < 6; ++i) six[i] = V::load(from + (i * 6 + j) * point);
      transform_to_four(six, to);
      for (int i = 0; i < 4; ++i) half[i][j] = to[i];
    }
    const V bias = p.bias ? V::load(static_cast<const T*>(p.bias) + c) : V(0);
    for (int i = 0; i < 4 && tile.top + i < p.height; ++i) {
      V to[4];
      transform_to_four(half[i], to);
      for (int j = 0; j < 4 && tile.left + j < p.width; ++j) {
        const int64_t pixel = (tile.sample * p.height + tile.top + i) * p.width + tile.left + j;
        const int64_t at = pixel * p.out_channels + c;
        V result = to[j] + bias;
        if (p.add) result = result + V::load(static_cast<const T*>(p.add) + at);
        result.store(static_cast<T*>(p.y) + at);
      }
    }
  }
}

template <typename T>
void convolve(const imagen_fast::conv3x3::Problem& p) {
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
        transform_input<T>(p, tile_at(t, first + i), v + i * p.in_channels, t.chunk);
      }
      for (int64_t panel = 0; panel < t.panels; ++panel) {
        const int64_t left_columns = p.out_channels - panel * kPanelColumns;
        const int64_t columns = left_columns < kPanelColumns ? left_columns : kPanelColumns;
        for (int64_t point = 0; point < kPoints; ++point) {
          attention::multiply<float, attention::Store::kScaled>(
              {v + point * t.chunk * p.in_channels, p.in_channels, 1},
              {p.weight + (point * t.panels + panel) * p.in_channels * kPanelColumns, kPanelColumns},
              attention::kTileColumns<float>, {m + point * t.chunk * kPanelColumns, kPanelColumns}, tiles, columns,
              p.in_channels);
        }
        for (int64_t i = 0; i < tiles; ++i) {
          transform_output<T>(p, t, tile_at(t, first + i), m + i * kPanelColumns, panel * kPanelColumns, columns);
        }
      }
    }
  });
}

}  // namespace

void conv3x3(const imagen_fast::conv3x3::Problem& p) {
  if (p.dtype == DType::kHalf) return convolve<Half>(p);
  if (p.dtype == DType::kBFloat16) return convolve<BFloat16>(p);
  convolve<float>(p);
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
