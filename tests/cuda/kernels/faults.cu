// Kernels with one fault each; tests/cuda/test_emulator.py says how each is found.
#include "cases.h"

namespace imagen_fast {

bool is_nan(float x) { return x != x; }

// ---- Barriers

// Right as long as thread i - 1 runs before thread i.
__global__ void neighbour_without_barrier(float* x) {
  SHARED(tile, float[64]);
  const unsigned i = threadIdx.x;
  tile[i] = x[i];
  x[i] = i == 0 ? 0 : tile[i - 1];
}
CASE(missing_barrier) {
  Array<float> x = numbers(64, 1);
  launch(blocks_of(1, 64), neighbour_without_barrier, x.data());
  for (int i = 0; i < 64; ++i) expect(x[i] == static_cast<float>(i), "element " + std::to_string(i));
}

// Writes the next tile while others may still read this one; every result is right here.
__global__ void sums_without_second_barrier(const float* x, float* y) {
  SHARED(tile, float[64]);
  float sum = 0;
  for (int step = 0; step < 2; ++step) {
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    sum += tile[63 - threadIdx.x];
  }
  y[threadIdx.x] = sum;
}
CASE(missing_second_barrier) {
  const Array<float> x = numbers(64);
  Array<float> y(64);
  launch(blocks_of(1, 64), sums_without_second_barrier, x.data(), y.data());
}

__global__ void exchange_without_syncwarp(float* x) {
  SHARED(tile, float[32]);
  tile[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = tile[threadIdx.x ^ 1];
}
CASE(missing_syncwarp) {
  Array<float> x = numbers(32);
  launch(blocks_of(1, 32), exchange_without_syncwarp, x.data());
}

__global__ void barrier_in_each_branch(float* x) {
  if (threadIdx.x < 32) {
    __syncthreads();
    x[threadIdx.x] = 1;
  } else {
    __syncthreads();
  }
}
CASE(divergent_barrier) {
  Array<float> x(64);
  launch(blocks_of(1, 64), barrier_in_each_branch, x.data());
}

__global__ void barrier_in_one_branch(float* x) {
  if (threadIdx.x < 32) __syncthreads();
  x[threadIdx.x] = 1;
}
CASE(barrier_that_some_skip) {
  Array<float> x(64);
  launch(blocks_of(1, 64), barrier_in_one_branch, x.data());
}

__global__ void shuffle_of_half_a_warp(float* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 1);
  __syncthreads();
}
CASE(deadlock) {
  Array<float> x(32);
  launch(blocks_of(1, 32), shuffle_of_half_a_warp, x.data());
}

__global__ void different_shuffles(float* x) {
  if (threadIdx.x < 16) {
    x[threadIdx.x] = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 1);
  } else {
    x[threadIdx.x] = __shfl_sync(kFullWarp, x[threadIdx.x], 1);
  }
}
CASE(lanes_that_disagree) {
  Array<float> x(32);
  launch(blocks_of(1, 32), different_shuffles, x.data());
}

__global__ void shuffle_outside_of_mask(float* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_sync(0xffffu, x[threadIdx.x], 20);
}
CASE(shuffle_from_a_lane_that_takes_no_part) {
  Array<float> x = numbers(32);
  launch(blocks_of(1, 32), shuffle_outside_of_mask, x.data());
  expect(!is_nan(x[0]), "NaN");
}

__global__ void grid_barrier() { grid_sync(); }
CASE(grid_sync_without_cooperative_launch) { launch(blocks_of(2, 32), grid_barrier); }

// ---- Shared memory

__global__ void read_uninitialised(float* x) {
  SHARED(tile, float[32]);
  x[threadIdx.x] = tile[threadIdx.x] + dynamic_shared<float>()[threadIdx.x];
}
CASE(uninitialised_shared_memory) {
  Array<float> x(32);
  launch(blocks_of(1, 32, 128), read_uninitialised, x.data());
  expect(!is_nan(x[5]), "NaN");
}

__global__ void write_past_static(int i) {
  SHARED(tile, float[32]);
  if (threadIdx.x == 0) tile[i] = 1;
}
CASE(shared_variable_overrun) { launch(blocks_of(1, 32), write_past_static, 32); }

__global__ void write_past_dynamic(int i) {
  if (threadIdx.x == 0) dynamic_shared<float>()[i] = 1;
}
CASE(dynamic_shared_memory_overrun) { launch(blocks_of(1, 32, 128), write_past_dynamic, 32); }

__global__ void read_past_dynamic(float* y, int i) { y[0] = dynamic_shared<float>()[i]; }
CASE(dynamic_shared_memory_overread) {
  Array<float> y(1);
  launch(blocks_of(1, 1, 128), read_past_dynamic, y.data(), -1);
}

__global__ void large_static(float* x) {
  SHARED(tile, float[64][256]);
  x[0] = tile[0][0];
}
CASE(too_much_static_shared_memory) {
  Array<float> x(1);
  launch(blocks_of(1, 1), large_static, x.data());
}

// ---- Global memory

__global__ void off_by_one(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
CASE(read_past_the_end) {
  const Array<float> x = numbers(32);
  Array<float> y(32);
  launch(blocks_of(1, 32), off_by_one, x.data(), y.data());
}
CASE(write_past_the_end) {
  const Array<float> x = numbers(40);
  Array<float> y(32);
  launch(blocks_of(1, 33), off_by_one, x.data(), y.data());
}

__global__ void same_element(float* y) {
  if (threadIdx.x == 0) y[0] = static_cast<float>(blockIdx.x);
}
CASE(two_blocks_write_one_element) {
  Array<float> y(1);
  launch(blocks_of(2, 32), same_element, y.data());
}

__global__ void count_without_atomics(int* count) { ++*count; }
CASE(counting_without_atomics) {
  Array<int> count(1);
  launch(blocks_of(1, 32), count_without_atomics, count.data());
}

__global__ void partial_sums_without_grid_sync(float* partial, float* y) {
  if (threadIdx.x > 0) return;
  partial[blockIdx.x] = 1;
  if (blockIdx.x == 0) {
    for (unsigned i = 0; i < gridDim.x; ++i) y[0] += partial[i];
  }
}
CASE(missing_grid_sync) {
  Array<float> partial(4), y(1);
  LaunchConfig config = blocks_of(4, 32);
  config.cooperative = true;
  launch(config, partial_sums_without_grid_sync, partial.data(), y.data());
  expect(y[0] == 4, "sum");
}

// ---- Alignment

__global__ void load_eight(const __half* x, float* y) { y[0] = to_float(load<8>(x)[0]); }
CASE(misaligned_vector) {
  alignas(16) __half x[16] = {};
  Array<float> y(1);
  launch(blocks_of(1, 1), load_eight, x + 1, y.data());
}

__global__ void load_by_hand(const float* x, float* y) { y[0] = reinterpret_cast<const float4*>(x)->w; }
CASE(misaligned_pointer) {
  alignas(16) float x[8] = {};
  Array<float> y(1);
  launch(blocks_of(1, 1), load_by_hand, x + 1, y.data());
}

__global__ void matrix_from(int offset) {
  SHARED_ALIGNED(16, rows, __half[33][8]);
  uint32_t fragment[4];
  ldmatrix_x4(fragment, &rows[0][0] + 8 * lane() + offset);
}
CASE(misaligned_ldmatrix) { launch(blocks_of(1, 32), matrix_from, 1); }

__global__ void matrix_from_global(const float* x) {
  uint32_t fragment[4];
  ldmatrix_x4(fragment, x);
}
CASE(ldmatrix_of_global_memory) {
  alignas(16) const float x[4] = {};
  launch(blocks_of(1, 32), matrix_from_global, x);
}

// ---- Copies in the background

template <int wait, bool barrier>
__global__ void copy_and_read(const float* x, float* y) {
  float* tile = dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  copy_async_16(tile + 4 * i, x + 4 * i);
  copy_async_commit();
  if constexpr (wait >= 0) copy_async_wait<wait>();
  if constexpr (barrier) __syncthreads();
  y[i] = tile[4 * ((i + 1) % blockDim.x)];
}
template <int wait, bool barrier>
void check_copy() {
  alignas(16) float x[256];
  for (int i = 0; i < 256; ++i) x[i] = static_cast<float>(i);
  Array<float> y(64);
  launch(blocks_of(1, 64, sizeof(x)), copy_and_read<wait, barrier>, x, y.data());
  for (int i = 0; i < 64; ++i) expect(y[i] == x[4 * ((i + 1) % 64)], "element " + std::to_string(i));
}
CASE(missing_wait_for_copies) { check_copy<-1, true>(); }
CASE(wait_for_too_few_copies) { check_copy<1, true>(); }
CASE(missing_barrier_after_copies) { check_copy<0, false>(); }

__global__ void copy_over_what_is_read(const float* x, float* y) {
  float* tile = dynamic_shared<float>();
  const unsigned i = threadIdx.x;
  for (int step = 0; step < 2; ++step) {
    copy_async_16(tile + 4 * i, x + 4 * i);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    y[i] = tile[4 * ((i + 1) % blockDim.x)];
  }
}
CASE(copy_over_what_others_read) {
  alignas(16) float x[256] = {};
  Array<float> y(64);
  launch(blocks_of(1, 64, sizeof(x)), copy_over_what_is_read, x, y.data());
}

// ---- Clusters

__global__ void read_from(unsigned rank, bool first, bool last, float* y) {
  SHARED(mine, float);
  if (threadIdx.x == 0) mine = static_cast<float>(cluster_rank());
  if (first) cluster_sync();
  if (threadIdx.x == 0) y[blockIdx.x] = *map_shared_rank(&mine, (cluster_rank() + rank) % (rank < 8 ? 4 : 99));
  if (last) cluster_sync();
}
void check_cluster(unsigned rank, bool first, bool last) {
  Array<float> y(4);
  LaunchConfig config = blocks_of(4, 32);
  config.cluster = 4;
  launch(config, read_from, rank, first, last, y.data());
  for (unsigned i = 0; i < 4; ++i) expect(y[i] == static_cast<float>((i + rank) % 4), "block " + std::to_string(i));
}
CASE(cluster_rank_that_is_none) { check_cluster(50, true, true); }
CASE(missing_first_cluster_sync) { check_cluster(1, false, true); }
CASE(missing_last_cluster_sync) { check_cluster(1, true, false); }

__global__ void map_global(float* x) { *map_shared_rank(x, 0) = 1; }
CASE(map_of_what_is_not_shared) {
  Array<float> x(1);
  launch(blocks_of(1, 32), map_global, x.data());
}

// ---- Launches

__global__ void nothing() {}
CASE(too_many_threads) { launch(blocks_of(1, 1025), nothing); }
CASE(empty_grid) { launch(blocks_of(0, 32), nothing); }
CASE(too_much_shared_memory) { launch(blocks_of(1, 32, 227 * 1024 + 1), nothing); }
CASE(too_large_a_cluster) {
  LaunchConfig config = blocks_of(16, 32);
  config.cluster = 16;
  launch(config, nothing);
}
CASE(cluster_that_does_not_divide_the_grid) {
  LaunchConfig config = blocks_of(6, 32);
  config.cluster = 4;
  launch(config, nothing);
}
CASE(cluster_of_two) {
  LaunchConfig config = blocks_of(2, 32);
  config.cluster = 2;
  launch(config, nothing);
}
CASE(too_large_a_cooperative_grid) {
  LaunchConfig config = blocks_of(9, 1024);
  config.cooperative = true;
  launch(config, nothing);
}

__global__ void deep(float* x, int levels) {
  volatile float frame[8192];
  for (int i = 0; i < 8192; ++i) frame[i] = x[0];
  if (levels > 0) deep(x, levels - 1);
  x[0] = frame[levels];
}
CASE(stack_overflow) {
  Array<float> x(1);
  launch(blocks_of(1, 2), deep, x.data(), 5);
}

}  // namespace imagen_fast
