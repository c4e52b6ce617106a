// Products of matrices by matrix tiles (AMX): registers of 16 rows of 64 bytes, and an instruction that adds the
// product of 16 x 32 and 32 x 16 elements of bf16 to 16 x 16 floats. Compiled for AVX-512 with bf16, whose packed
// operands have the order that tiles need; the instructions are written by name, so that no other code can contain
// them.
//
// EmulatedTiles does the same with arrays, for tests on machines without.
#pragma once

#include "cpu_matmul.h"

#ifdef __AVX512BF16__
namespace imagen_fast::IMAGEN_FAST_ISA::attention {

constexpr int kTileSide = 16;
constexpr int kTileBytes = 64;

struct HardwareTiles {
  HardwareTiles() {
    struct alignas(64) Configuration {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    static_assert(sizeof(Configuration) == 64);
    for (int i = 0; i < 8; ++i) {
      configuration.bytes_per_row[i] = kTileBytes;
      configuration.rows[i] = kTileSide;
    }
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~HardwareTiles() { asm volatile("tilerelease"); }
  HardwareTiles(const HardwareTiles&) = delete;
  HardwareTiles& operator=(const HardwareTiles&) = delete;

  template <int kTile>
  IMAGEN_FAST_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Strides in bytes
  template <int kTile>
  IMAGEN_FAST_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  IMAGEN_FAST_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  IMAGEN_FAST_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

class EmulatedTiles {
 public:
  template <int kTile>
  void zero() {
    std::memset(tile_[kTile], 0, sizeof(tile_[kTile]));
  }
  template <int kTile>
  void load(const void* from, int64_t stride) {
    for (int i = 0; i < kTileSide; ++i) {
      std::memcpy(tile_[kTile][i], static_cast<const char*>(from) + i * stride, kTileBytes);
    }
  }
  template <int kTile>
  void store(void* to, int64_t stride) {
    for (int i = 0; i < kTileSide; ++i) {
      std::memcpy(static_cast<char*>(to) + i * stride, tile_[kTile][i], kTileBytes);
    }
  }
  template <int kSum, int kLeft, int kRight>
  void multiply_add() {
    for (int i = 0; i < kTileSide; ++i) {
      for (int j = 0; j < kTileSide; ++j) {
        float sum = bit_cast<float>(tile_[kSum][i][j]);
        for (int step = 0; step < kTileSide; ++step) {
          const uint32_t left = tile_[kLeft][i][step], right = tile_[kRight][step][j];
          sum += bit_cast<float>(left << 16) * bit_cast<float>(right << 16);
          sum += bit_cast<float>(left & 0xffff0000u) * bit_cast<float>(right & 0xffff0000u);
        }
        tile_[kSum][i][j] = bit_cast<uint32_t>(sum);
      }
    }
  }

 private:
  uint32_t tile_[8][kTileSide][kTileSide];
};

// Rows x columns of tiles, 1 or 2 each, of C
template <Store kStore, int kRows, int kColumns, typename Tiles>
IMAGEN_FAST_INLINE void multiply_tiles(Tiles& tiles, Left<BFloat16> a, Right<BFloat16> b, Result<float> c,
                                       int64_t steps) {
  constexpr int64_t kBytes = sizeof(BFloat16);
  const int64_t a_stride = a.row * kBytes, b_stride = b.step * kBytes, c_stride = c.row * sizeof(float);
  const auto a_at = [&](int i) { return a.data + i * kTileSide * a.row; };
  const auto b_at = [&](int j) { return b.data + j * 2 * kTileSide; };
  const auto c_at = [&](int i, int j) { return c.data + i * kTileSide * c.row + j * kTileSide; };
  if constexpr (kStore == Store::kAdded) {
    tiles.template load<0>(c_at(0, 0), c_stride);
    if constexpr (kColumns == 2) tiles.template load<1>(c_at(0, 1), c_stride);
    if constexpr (kRows == 2) tiles.template load<2>(c_at(1, 0), c_stride);
    if constexpr (kRows == 2 && kColumns == 2) tiles.template load<3>(c_at(1, 1), c_stride);
  } else {
    tiles.template zero<0>();
    if constexpr (kColumns == 2) tiles.template zero<1>();
    if constexpr (kRows == 2) tiles.template zero<2>();
    if constexpr (kRows == 2 && kColumns == 2) tiles.template zero<3>();
  }
  for (; steps > 0; steps -= kTileSide) {
    tiles.template load<4>(a_at(0), a_stride);
    if constexpr (kRows == 2) tiles.template load<5>(a_at(1), a_stride);
    tiles.template load<6>(b_at(0), b_stride);
    if constexpr (kColumns == 2) tiles.template load<7>(b_at(1), b_stride);
    tiles.template multiply_add<0, 4, 6>();
    if constexpr (kColumns == 2) tiles.template multiply_add<1, 4, 7>();
    if constexpr (kRows == 2) tiles.template multiply_add<2, 5, 6>();
    if constexpr (kRows == 2 && kColumns == 2) tiles.template multiply_add<3, 5, 7>();
    a.data += kTileSide * a.step;
    b.data += kTileSide * b.step;
  }
  tiles.template store<0>(c_at(0, 0), c_stride);
  if constexpr (kColumns == 2) tiles.template store<1>(c_at(0, 1), c_stride);
  if constexpr (kRows == 2) tiles.template store<2>(c_at(1, 0), c_stride);
  if constexpr (kRows == 2 && kColumns == 2) tiles.template store<3>(c_at(1, 1), c_stride);
}

// C = A B, or C + A B, as `multiply` of cpu_matmul.h, for whole tiles: rows, columns and steps are multiples of 16, and
// the steps of a row of A are adjacent.
template <Store kStore, typename Tiles>
void multiply_in_tiles(Tiles& tiles, Left<BFloat16> a, Right<BFloat16> b, int64_t panel, Result<float> c, int64_t rows,
                       int64_t columns, int64_t steps) {
  constexpr int64_t kPanelColumns = kTileColumns<float>;
  for (int64_t j = 0; j < columns; j += 2 * kTileSide) {
    const Right<BFloat16> right{b.data + j / kPanelColumns * panel + j % kPanelColumns * 2, b.step};
    const bool two_columns = columns - j > kTileSide;
    for (int64_t i = 0; i < rows; i += 2 * kTileSide) {
      const Left<BFloat16> left{a.data + i * a.row, a.row, a.step};
      const Result<float> result{c.data + i * c.row + j, c.row};
      const bool two_rows = rows - i > kTileSide;
      if (two_rows && two_columns) {
        multiply_tiles<kStore, 2, 2>(tiles, left, right, result, steps);
      } else if (two_rows) {
        multiply_tiles<kStore, 2, 1>(tiles, left, right, result, steps);
      } else if (two_columns) {
        multiply_tiles<kStore, 1, 2>(tiles, left, right, result, steps);
      } else {
        multiply_tiles<kStore, 1, 1>(tiles, left, right, result, steps);
      }
    }
  }
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA::attention
#endif
