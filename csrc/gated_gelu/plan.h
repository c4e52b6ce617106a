// How the rows of gated_gelu are cut into tiles: a block takes part of a wide row, or several narrow ones.
#pragma once

#include <algorithm>

#include "../common/cuda.cuh"

namespace imagen_fast::gated_gelu::device {

constexpr int kMaxThreads = 256;

struct Plan {
  int vector;         // elements of a thread, in one access of each tensor
  int64_t blocks;     // of a row
  int threads;        // abreast on a row
  int rows;           // of a block
  int64_t row_tiles;  // blocks that all rows take, one below the other
};

// `aligned` says that all rows begin at multiples of 16 bytes.
inline Plan make_plan(int64_t rows, int64_t width, int element_bytes, bool aligned) {
  Plan plan{};
  const int widest = 16 / element_bytes;
  plan.vector = aligned && width % widest == 0 ? widest : 1;
  const int64_t vectors = width / plan.vector;
  plan.blocks = ceil_div<int64_t>(vectors, kMaxThreads);
  plan.threads = static_cast<int>(ceil_div(vectors, plan.blocks));
  plan.rows = static_cast<int>(std::min<int64_t>(kMaxThreads / plan.threads, rows));
  plan.row_tiles = ceil_div<int64_t>(rows, plan.rows);
  return plan;
}

}  // namespace imagen_fast::gated_gelu::device
