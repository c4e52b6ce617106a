// The wrappers of cuda.cuh inside kernels, as nvcc compiles them. (On the host: simt/.) What an architecture lacks
// compiles to what is right without it: before 9.0 a block is a cluster of its own.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace imagen_fast {

// The emulator checks alignment here.
template <typename T>
__device__ __forceinline__ T* check_aligned(T* pointer) {
  return pointer;
}

// ---- Shared memory

// SHARED(tile, float[64][33]); declares a variable `tile` of that type, one for the block, uninitialised.
#define SHARED(name, ...) __shared__::imagen_fast::SharedType<__VA_ARGS__> name

template <typename T>
using SharedType = T;

constexpr int kDynamicSharedAlignment = 128;

// The start of the block's dynamic shared memory, of LaunchConfig::shared_bytes bytes, aligned to 128 bytes
template <typename T = unsigned char>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(kDynamicSharedAlignment) unsigned char imagen_fast_dynamic_shared[];
  return reinterpret_cast<T*>(imagen_fast_dynamic_shared);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Clusters and the grid

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The block's number in its cluster
__device__ __forceinline__ unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ unsigned cluster_size() { return __clusterSizeInBlocks(); }

// A barrier of all threads of the cluster, which orders accesses to the distributed shared memory. One must come before
// the first access to another block's (it may not have started) and one after the last (it may have ended).
__device__ __forceinline__ void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// Where block `rank` of the cluster has what this block has at `pointer` in its shared memory
template <typename T>
__device__ __forceinline__ T* map_shared_rank(T* pointer, unsigned rank) {
  return static_cast<T*>(
      __cluster_map_shared_rank(const_cast<void*>(static_cast<const void*>(pointer)), static_cast<int>(rank)));
}

#else

__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ T* map_shared_rank(T* pointer, unsigned) {
  return pointer;
}

#endif

// A barrier of all threads of a cooperative launch, which orders accesses to global memory
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// ---- Copies from global to shared memory in the background

// Copy 16 bytes, both addresses aligned to 16. Of the source only the first `valid_bytes` are read; the rest of the
// target becomes zero. With 0 the source may be any pointer.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int valid_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid_bytes)
               : "memory");
}

// The thread's copies since its last commit become one group.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Wait until at most the `groups` youngest groups of this thread are in flight. What other threads copied is there
// after they have waited too and a barrier.
template <int groups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(groups) : "memory");
}

// ---- Matrix instructions: all 32 lanes take part

// Four 8x8 matrices of 16-bit elements from shared memory. Lanes 8 m … 8 m + 7 pass the addresses of matrix m's rows
// (16 bytes, aligned). fragment[m] of lane l: elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix m, or of
// its transpose.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices, addresses from lanes 0 … 15
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&fragment)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_transposed(uint32_t (&fragment)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b with a 16x16, b 16x8 of T (__half or __nv_bfloat16) and d 16x8 of float. With g = lane / 4 and t = lane % 4:
//   a[0]: (g, 2t) (g, 2t+1)   a[1]: (g+8, 2t) …   a[2]: (g, 2t+8) …   a[3]: (g+8, 2t+8) …
//   b[0]: (2t, g) (2t+1, g)   b[1]: (2t+8, g) (2t+9, g)
//   d[0]: (g, 2t)   d[1]: (g, 2t+1)   d[2]: (g+8, 2t)   d[3]: (g+8, 2t+1)
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "mma_m16n8k16 takes half and bfloat16");
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// ---- Registers

// x, of which the compiler forgets where it came from: so it computes what follows from x where that is used, instead
// of keeping it in registers throughout a loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- Arithmetic of the special function unit: a relative error of about 2^-22, subnormals are zero

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace imagen_fast
