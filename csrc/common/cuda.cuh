// What the CUDA kernels are written in. The same device code compiles two ways:
//
// - by nvcc, for a GPU: the wrappers are PTX and intrinsics (cuda_device.cuh, cuda_launch.cuh);
// - by a C++ compiler with IMAGEN_FAST_EMULATED, for tests: the wrappers and CUDA's own names (threadIdx,
//   __syncthreads, __shfl_xor_sync, atomicAdd, …) are those of the host emulator (simt/simt.h), which also checks what
//   the kernel does.
//
// So a kernel says what needs PTX or an extension of the language by the names below, and contains no `asm`, `<<<>>>`,
// `extern __shared__` and `__CUDA_ARCH__`. No torch header comes in from here.
//
//   Launching (host)          LaunchConfig, launch, device_properties, resident_blocks, resident_clusters
//   Shared memory             SHARED(name, type), SHARED_ALIGNED(bytes, name, type), dynamic_shared<T>()
//   Cluster, grid             cluster_rank, cluster_size, cluster_sync, map_shared_rank, grid_sync
//   Copies to shared memory   copy_async_16, copy_async_commit, copy_async_wait<groups in flight>
//   Matrices                  ldmatrix_x4, ldmatrix_x4_transposed, ldmatrix_x2, ldmatrix_x2_transposed, mma_m16n8k16<T>
//   Arithmetic                fast_exp2, fast_rcp, fast_rsqrt
//   Registers                 opaque
//   Numbers (cuda_numbers.cuh)   to_float, from_float<T>, pack2<T>, unpack2<T>
//   Memory (cuda_memory.cuh)     Vector<T, N>, load, store, and their streaming forms
//   Below                     thread_rank, warp_rank, lane, shuffles of any type, warp_reduce, block_reduce
#pragma once

#ifdef IMAGEN_FAST_EMULATED
#include "simt/simt.h"
#else
#include "cuda_device.cuh"
#include "cuda_launch.cuh"
#endif

#include "cuda_memory.cuh"
#include "cuda_numbers.cuh"

namespace imagen_fast {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The thread's number in its block, whatever the block's shape
__device__ __forceinline__ int thread_rank() {
  return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }
__device__ __forceinline__ int warp_rank() { return thread_rank() / kWarpSize; }
__device__ __forceinline__ int lane() { return thread_rank() % kWarpSize; }

// Shuffles of any trivially copyable T whose size is a multiple of 4 bytes, by all lanes of the warp

template <typename T, typename Shuffle>
__device__ __forceinline__ T shuffle_words(const T& value, Shuffle shuffle) {
  static_assert(sizeof(T) % 4 == 0, "shuffles move words of 4 bytes");
  constexpr int kWords = sizeof(T) / 4;
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = shuffle(words[i]);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// The value of lane `lane() ^ mask`
template <typename T>
__device__ __forceinline__ T shuffle_xor(const T& value, int mask) {
  return shuffle_words(value, [mask](uint32_t word) { return __shfl_xor_sync(kFullWarp, word, mask); });
}

// The value of lane `source`
template <typename T>
__device__ __forceinline__ T shuffle(const T& value, int source) {
  return shuffle_words(value, [source](uint32_t word) { return __shfl_sync(kFullWarp, word, source); });
}

// Operations of reductions, with their neutral element. Max and Min skip NaN, as fmaxf does.
template <typename T>
struct Sum {
  static constexpr T kNeutral = T(0);
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
template <typename T>
struct Max {
  static constexpr T kNeutral =
      std::numeric_limits<T>::has_infinity ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::lowest();
  __device__ __forceinline__ T operator()(T a, T b) const { return a > b || b != b ? a : b; }
};
template <typename T>
struct Min {
  static constexpr T kNeutral =
      std::numeric_limits<T>::has_infinity ? std::numeric_limits<T>::infinity() : std::numeric_limits<T>::max();
  __device__ __forceinline__ T operator()(T a, T b) const { return a < b || b != b ? a : b; }
};

// Every lane gets the reduction over its aligned `width` lanes (a power of two). All lanes of the warp must call it.
// The order is fixed, so the result is the same in every run, and the same in every lane if `operation` commutes.
template <int width = kWarpSize, typename T, typename Operation>
__device__ __forceinline__ T warp_reduce(T value, Operation operation) {
  static_assert(width > 0 && width <= kWarpSize && (width & (width - 1)) == 0, "width is a power of two, at most 32");
#pragma unroll
  for (int offset = width / 2; offset > 0; offset /= 2) value = operation(value, shuffle_xor(value, offset));
  return value;
}
template <int width = kWarpSize, typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce<width>(value, Sum<T>());
}
template <int width = kWarpSize, typename T>
__device__ __forceinline__ T warp_max(T value) {
  return warp_reduce<width>(value, Max<T>());
}

// Every thread gets the reduction over the block, whose size must be a multiple of 32. All threads must call it. Calls
// can follow each other; a block of one warp passes no barrier, so do not count on one. T is trivial (a float, a struct
// of floats); `neutral` is the operation's neutral element.
template <typename T, typename Operation>
__device__ __forceinline__ T block_reduce(T value, Operation operation, T neutral) {
  SHARED(partial, T[kWarpSize]);
  const int warps = block_threads() / kWarpSize;
  value = warp_reduce(value, operation);
  if (warps == 1) return value;
  if (lane() == 0) partial[warp_rank()] = value;
  __syncthreads();
  value = warp_reduce(lane() < warps ? partial[lane()] : neutral, operation);
  __syncthreads();  // the next call writes `partial` again
  return value;
}
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  return block_reduce(value, Sum<T>(), Sum<T>::kNeutral);
}
template <typename T>
__device__ __forceinline__ T block_max(T value) {
  return block_reduce(value, Max<T>(), Max<T>::kNeutral);
}

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace imagen_fast
