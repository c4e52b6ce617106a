// The matrix instructions, as what the 32 lanes of a warp do together.
#pragma once

#include "memory.h"
#include "scheduler.h"

namespace imagen_fast {
namespace simt {

struct LoadMatrix {
  const void* row;
  uint32_t* fragment;
};

// Lane 8 m + i has the address of row i of matrix m.
template <int matrices, bool transposed>
__attribute__((no_sanitize("thread"))) void complete_load_matrix(void* const* records) {
  const auto lane_of = [records](int lane) { return static_cast<LoadMatrix*>(records[lane]); };
  for (int m = 0; m < matrices; ++m) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(matrix[row], lane_of(8 * m + row)->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint32_t low = transposed ? matrix[j][i] : matrix[i][j];
      const uint32_t high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
      lane_of(lane)->fragment[m] = high << 16 | low;
    }
  }
}

template <int matrices, bool transposed>
void load_matrix(uint32_t* fragment, const void* row, Location where) {
  if (this_thread->lane() < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail_misaligned(row, 16, where);
    if (!shared_memory_owner(row)) fail("ldmatrix, " + where.text() + ": the row is not in shared memory");
    record_access(row, 16, Access::kRead, __builtin_return_address(0));
  }
  LoadMatrix mine{row, fragment};
  meet(0xffffffffu, "ldmatrix", where, &mine, complete_load_matrix<matrices, transposed>);
}

struct MultiplyMatrices {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <typename T>
void complete_multiply_matrices(void* const* records) {
  float a[16][16], b[16][8], d[16][8];
  const auto unpack = [](uint32_t packed, float* low, float* high) {
    T pair[2];
    std::memcpy(pair, &packed, sizeof(packed));
    *low = pair[0], *high = pair[1];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MultiplyMatrices*>(records[lane]);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      float* row = &a[g + 8 * (i % 2)][t + 8 * (i / 2)];
      unpack(mine.a[i], &row[0], &row[1]);
      d[g + 8 * (i / 2)][t + i % 2] = mine.d[i];
    }
    for (int i = 0; i < 2; ++i) unpack(mine.b[i], &b[t + 8 * i][g], &b[t + 8 * i + 1][g]);
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<MultiplyMatrices*>(records[lane]);
    for (int i = 0; i < 4; ++i) mine.d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace simt

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row, simt::Location where = simt::Location::here()) {
  simt::load_matrix<4, false>(fragment, row, where);
}
inline void ldmatrix_x4_transposed(uint32_t (&fragment)[4], const void* row,
                                   simt::Location where = simt::Location::here()) {
  simt::load_matrix<4, true>(fragment, row, where);
}
inline void ldmatrix_x2(uint32_t (&fragment)[2], const void* row, simt::Location where = simt::Location::here()) {
  simt::load_matrix<2, false>(fragment, row, where);
}
inline void ldmatrix_x2_transposed(uint32_t (&fragment)[2], const void* row,
                                   simt::Location where = simt::Location::here()) {
  simt::load_matrix<2, true>(fragment, row, where);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  simt::Location where = simt::Location::here()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "mma_m16n8k16 takes half and bfloat16");
  simt::MultiplyMatrices mine{d, a, b};
  simt::meet(0xffffffffu, "mma_m16n8k16", where, &mine, simt::complete_multiply_matrices<T>);
}

}  // namespace imagen_fast
