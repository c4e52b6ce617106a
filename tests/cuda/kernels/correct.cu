// Kernels without a fault, one for each thing that the emulator emulates. Run in every order and flavour.
#include <algorithm>

#include "cases.h"

namespace imagen_fast {

// ---- Threads, blocks, barriers

__global__ void coordinates(int* seen) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  seen[block * threads + static_cast<unsigned>(thread_rank())] =
      static_cast<int>(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x + 10000 * blockIdx.y);
}
CASE(every_thread_of_every_block_runs_once) {
  Array<int> seen(3 * 2 * 5 * 3 * 2, -1);
  LaunchConfig config;
  config.grid = dim3(3, 2);
  config.block = dim3(5, 3, 2);
  launch(config, coordinates, seen.data());
  expect(seen.front() == 0 && seen[5 * 3 * 2 - 1] == 4 + 20 + 100 && seen.back() == 4 + 20 + 100 + 2000 + 10000,
         "coordinates");
  expect(std::count(seen.begin(), seen.end(), -1) == 0, "a thread did not run");
}

__global__ void reverse(float* x) {
  SHARED(tile, float[256]);
  float* also = dynamic_shared<float>();
  tile[threadIdx.x] = x[threadIdx.x];
  also[threadIdx.x] = 2 * x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[255 - threadIdx.x] + also[255 - threadIdx.x];
}
CASE(static_and_dynamic_shared_memory) {
  Array<float> x = numbers(256);
  launch(blocks_of(1, 256, 1024), reverse, x.data());
  for (int i = 0; i < 256; ++i) expect(x[i] == 3.f * (255 - i), "element " + std::to_string(i));
}

__global__ void votes(int* result) {
  const int odd = __syncthreads_count(threadIdx.x % 2);
  const int any = __syncthreads_or(threadIdx.x == 77);
  const int all = __syncthreads_and(threadIdx.x < 95);
  if (threadIdx.x == 95) result[0] = odd, result[1] = any, result[2] = all;
}
CASE(barriers_that_count) {
  Array<int> result(3);
  launch(blocks_of(1, 96), votes, result.data());
  expect(result == Array<int>({48, 1, 0}), "votes");
}

__global__ void leave_early(float* x) {
  if (threadIdx.x >= 32) return;
  x[threadIdx.x] = warp_sum(x[threadIdx.x]);
}
CASE(threads_may_return_while_other_warps_go_on) {
  Array<float> x = numbers(64);
  launch(blocks_of(1, 64), leave_early, x.data());
  expect(x[0] == 496 && x[31] == 496 && x[32] == 32, "sums");
}

// ---- Warps

__global__ void shuffles(int* result) {
  const int i = static_cast<int>(threadIdx.x);
  result[i] = __shfl_sync(kFullWarp, i, 3);
  result[32 + i] = __shfl_xor_sync(kFullWarp, i, 5);
  result[64 + i] = __shfl_up_sync(kFullWarp, i, 2);
  result[96 + i] = __shfl_down_sync(kFullWarp, i, 2, 8);
  result[128 + i] = __shfl_sync(kFullWarp, i, 1, 16);
}
CASE(shuffles_within_a_warp_and_its_segments) {
  Array<int> result(160);
  launch(blocks_of(1, 32), shuffles, result.data());
  for (int i = 0; i < 32; ++i) {
    expect(result[i] == 3 && result[32 + i] == (i ^ 5), "shfl, shfl_xor of lane " + std::to_string(i));
    expect(result[64 + i] == (i < 2 ? i : i - 2), "shfl_up of lane " + std::to_string(i));
    expect(result[96 + i] == (i % 8 < 6 ? i + 2 : i), "shfl_down of lane " + std::to_string(i));
    expect(result[128 + i] == i / 16 * 16 + 1, "shfl of width 16, lane " + std::to_string(i));
  }
}

__global__ void halves(unsigned* result) {
  const unsigned i = threadIdx.x;
  if (i % 2) {
    result[i] = __ballot_sync(0xaaaaaaaau, i < 8) + static_cast<unsigned>(__shfl_sync(0xaaaaaaaau, int(i), 31));
  } else {
    result[i] = static_cast<unsigned>(__any_sync(0x55555555u, i == 4) + __all_sync(0x55555555u, i == 4));
  }
  __syncwarp();
}
CASE(parts_of_a_warp_meet_apart) {
  Array<unsigned> result(32);
  launch(blocks_of(1, 32), halves, result.data());
  for (unsigned i = 0; i < 32; ++i) expect(result[i] == (i % 2 ? 0xaau + 31 : 1u), "lane " + std::to_string(i));
}

struct Pair {
  float a, b;
};
__global__ void reductions(float* result) {
  const float x = static_cast<float>(threadIdx.x);
  const Pair pair =
      block_reduce(Pair{x, -x}, [](Pair p, Pair q) { return Pair{p.a + q.a, fminf(p.b, q.b)}; }, Pair{0, 0});
  result[threadIdx.x] = pair.a + pair.b + warp_sum<8>(x) + block_max(x);
}
CASE(reductions_over_warp_and_block) {
  for (int threads : {32, 256, 1024}) {
    Array<float> result(threads);
    launch(blocks_of(1, threads), reductions, result.data());
    const float sum = 0.5f * threads * (threads - 1);
    for (int i = 0; i < threads; ++i) {
      const float group = 8.f * (i / 8 * 8) + 28;
      expect(result[i] == sum - (threads - 1) + group + (threads - 1), "thread " + std::to_string(i));
    }
  }
}

// ---- Clusters and the grid

__global__ void sum_of_cluster(const float* x, float* y) {
  SHARED(mine, float);
  if (threadIdx.x == 0) mine = x[blockIdx.x];
  cluster_sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *map_shared_rank(&mine, rank);
    y[blockIdx.x] = sum + 100.f * static_cast<float>(cluster_rank());
  }
  cluster_sync();  // nobody's memory goes away before all have read it
}
CASE(distributed_shared_memory) {
  const Array<float> x = numbers(8);
  Array<float> y(8);
  LaunchConfig config = blocks_of(8, 64);
  config.cluster = 4;
  launch(config, sum_of_cluster, x.data(), y.data());
  for (int i = 0; i < 8; ++i) expect(y[i] == (i < 4 ? 6 : 22) + 100 * (i % 4), "block " + std::to_string(i));
}

__global__ void sum_of_grid(const float* x, float* partial, float* y) {
  const float sum = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  grid_sync();
  if (threadIdx.x == 0) {
    y[blockIdx.x] = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) y[blockIdx.x] += partial[i];
  }
}
CASE(cooperative_grid) {
  const Array<float> x = numbers(6 * 128);
  Array<float> partial(6), y(6);
  LaunchConfig config = blocks_of(6, 128);
  config.cooperative = true;
  launch(config, sum_of_grid, x.data(), partial.data(), y.data());
  for (float sum : y) expect(sum == 0.5f * 768 * 767, "sum");
}

// The block that finishes last sums what all have left.
__global__ void sum_by_the_last_block(const float* x, float* partial, unsigned* finished, float* y) {
  SHARED(is_last, bool);
  const float sum = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicAdd(finished, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x == 1) {
    for (unsigned i = 0; i < gridDim.x; ++i) *y += partial[i];
  }
}
CASE(the_last_block_sees_what_the_others_wrote) {
  const Array<float> x = numbers(5 * 64);
  Array<float> partial(5), y(1);
  Array<unsigned> finished(1);
  launch(blocks_of(5, 64), sum_by_the_last_block, x.data(), partial.data(), finished.data(), y.data());
  expect(y[0] == 0.5f * 320 * 319, "sum");
}

__global__ void histogram(const int* x, int n, int* counts) {
  SHARED(local, int[16]);
  if (threadIdx.x < 16) local[threadIdx.x] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) atomicAdd(&local[x[i]], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
}
CASE(atomics) {
  Array<int> x(1000), counts(16);
  for (int i = 0; i < 1000; ++i) x[i] = i % 16;
  launch(blocks_of(3, 96), histogram, x.data(), 1000, counts.data());
  for (int i = 0; i < 16; ++i) expect(counts[i] == 3 * (i < 8 ? 63 : 62), "bin " + std::to_string(i));
}

// ---- Copies in the background

__global__ void pipeline(const float* x, int n, float* y) {
  float* stages = dynamic_shared<float>();  // [2][4 * blockDim.x]
  const int chunk = 4 * static_cast<int>(blockDim.x), mine = 4 * static_cast<int>(threadIdx.x);
  const auto fetch = [&](int i) {
    const int valid = max(0, min(4, n - i * chunk - mine));
    copy_async_16(stages + i % 2 * chunk + mine, x + i * chunk + mine, 4 * valid);
    copy_async_commit();
  };
  fetch(0);
  for (int i = 0; i * chunk < n; ++i) {
    fetch(i + 1);
    copy_async_wait<1>();
    __syncthreads();
    const float* stage = stages + i % 2 * chunk;
    for (int j = 0; j < 4; ++j) {
      const int from = (mine + j + 4) % chunk;  // what the neighbour copied
      if (i * chunk + mine + j < n) y[i * chunk + mine + j] = stage[from];
    }
    __syncthreads();
  }
}
CASE(asynchronous_copies) {
  const int n = 3 * 128 + 5;
  const Array<float> x = numbers(n);
  Array<float> y(n);
  launch(blocks_of(1, 32, 2 * 128 * 4), pipeline, x.data(), n, y.data());
  for (int i = 0; i < n; ++i) {
    const int from = i / 128 * 128 + (i + 4) % 128;
    expect(y[i] == (from < n ? from : 0), "element " + std::to_string(i));
  }
}

// ---- Vectors and 16-bit numbers

template <typename T>
__global__ void add_one(const T* x, T* y) {
  Vector<T, 8> v = load<8, Cache::kStreaming>(x + 8 * threadIdx.x);
  for (int i = 0; i < 8; ++i) v[i] = from_float<T>(to_float(v[i]) + 1);
  store<8>(y + 8 * threadIdx.x, v);
}
CASE(vectors_of_16_bit_numbers) {
  Array<__half> x(256), y(256);
  for (int i = 0; i < 256; ++i) x[i] = static_cast<float>(i);
  launch(blocks_of(1, 32), add_one<__half>, x.data(), y.data());
  for (int i = 0; i < 256; ++i) expect(static_cast<float>(y[i]) == i + 1, "element " + std::to_string(i));
  const float2 pair = unpack2<__nv_bfloat16>(pack2<__nv_bfloat16>(1.5f, -3.f));
  expect(pair.x == 1.5f && pair.y == -3, "pack2, unpack2");
}

// ---- Matrices

// c = a b, a [16][16], b [16][8]
template <typename T>
__global__ void multiply(const T* a, const T* b, float* c) {
  SHARED_ALIGNED(16, rows_of_a, T[16][24]);  // padded: rows of 48 bytes
  SHARED_ALIGNED(16, rows_of_b, T[16][8]);
  const int i = lane();
  for (int j = i; j < 256; j += 32) rows_of_a[j / 16][j % 16] = a[j];
  for (int j = i; j < 128; j += 32) rows_of_b[j / 8][j % 8] = b[j];
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  // Matrices 0, 1: rows 0 … 7 and 8 … 15 of the left half; 2, 3: of the right half
  ldmatrix_x4(fragment_a, &rows_of_a[i % 16][i / 16 * 8]);
  ldmatrix_x2_transposed(fragment_b, &rows_of_b[i % 16][0]);
  float d[4] = {};
  mma_m16n8k16<T>(d, fragment_a, fragment_b);
  for (int j = 0; j < 4; ++j) c[(i / 4 + j / 2 * 8) * 8 + 2 * (i % 4) + j % 2] = d[j];
}

template <typename T>
void check_multiply() {
  Array<T> a(256), b(128);
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>(i * 7 % 31 - 15);
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>(i * 5 % 17 - 8);
  Array<float> c(128);
  launch(blocks_of(1, 32), multiply<T>, a.data(), b.data(), c.data());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += static_cast<float>(a[16 * i + k]) * static_cast<float>(b[8 * k + j]);
      expect(c[8 * i + j] == sum, "element " + std::to_string(i) + ", " + std::to_string(j));
    }
  }
}
CASE(matrix_product_of_half) { check_multiply<__half>(); }
CASE(matrix_product_of_bfloat16) { check_multiply<__nv_bfloat16>(); }

__global__ void load_matrices(const uint16_t* x, uint32_t* y) {
  SHARED_ALIGNED(16, rows, uint16_t[32][8]);
  for (int j = 0; j < 8; ++j) rows[threadIdx.x][j] = x[8 * threadIdx.x + j];
  __syncwarp();
  uint32_t fragment[4], pair[2];
  ldmatrix_x4(fragment, rows[threadIdx.x]);
  for (int m = 0; m < 4; ++m) y[32 * m + threadIdx.x] = fragment[m];
  ldmatrix_x4_transposed(fragment, rows[threadIdx.x]);
  for (int m = 0; m < 4; ++m) y[32 * (4 + m) + threadIdx.x] = fragment[m];
  ldmatrix_x2(pair, threadIdx.x < 16 ? rows[threadIdx.x] : nullptr);
  for (int m = 0; m < 2; ++m) y[32 * (8 + m) + threadIdx.x] = pair[m];
}
CASE(layout_of_ldmatrix) {
  Array<uint16_t> x(256);
  for (int i = 0; i < 256; ++i) x[i] = static_cast<uint16_t>(i);
  Array<uint32_t> y(320);
  launch(blocks_of(1, 32), load_matrices, x.data(), y.data());
  for (int m = 0; m < 10; ++m) {
    const uint16_t* matrix = x.data() + 64 * (m % 4);
    for (int i = 0; i < 32; ++i) {
      const int row = i / 4, column = 2 * (i % 4);
      const bool transposed = m >= 4 && m < 8;
      const uint32_t low = transposed ? matrix[8 * column + row] : matrix[8 * row + column];
      const uint32_t high = transposed ? matrix[8 * (column + 1) + row] : matrix[8 * row + column + 1];
      expect(y[32 * m + i] == (high << 16 | low), "fragment " + std::to_string(m) + ", lane " + std::to_string(i));
    }
  }
}

CASE(what_the_device_can_hold) {
  const DeviceProperties& device = device_properties();
  expect(resident_blocks(votes, 1024, 0) == device.threads_per_multiprocessor / 1024, "blocks by threads");
  expect(resident_blocks(votes, 32, device.shared_bytes_per_block) == 1, "blocks by shared memory");
  LaunchConfig config = blocks_of(8, 256);
  config.cluster = 4;
  expect((resident_clusters(config, votes) > 0) == device.clusters(), "clusters");
}

}  // namespace imagen_fast
