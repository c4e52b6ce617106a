// The sums over a sample that rescaled guidance and the removal of the parallel component take, in float64 and in an
// order that depends on the sample's shape alone. guidance.h has the formulas.
#pragma once

#include "kernel_elements.cuh"

namespace imagen_fast::sampler_step::device {

constexpr int64_t kSumChunk = 16 << 10;  // elements of a block

// Of c and u less a constant each, so that a large mean costs no accuracy
struct Sums {
  double c, u, cc, cu, uu;
};

struct AddSums {
  __device__ __forceinline__ Sums operator()(const Sums& a, const Sums& b) const {
    return {a.c + b.c, a.u + b.u, a.cc + b.cc, a.cu + b.cu, a.uu + b.uu};
  }
};

// The constants: the first elements
template <typename T>
__device__ __forceinline__ double2 sum_offsets(const Problem& p, int64_t sample) {
  const Place first = element_at(p.order, 0);
  return {read<T, 1>(p.output, sample, first)[0], read<T, 1>(p.unconditional, sample, first)[0]};
}

// Grid: a block per chunk, counted by chunk, then sample.
template <typename T>
__global__ void __launch_bounds__(kThreads) guidance_sums(Problem p, Chunks chunks, Sums* parts) {
  const ChunkOfSample mine(chunks, p.order.size());
  const double2 offset = sum_offsets<T>(p, mine.sample);
  Sums sums{0, 0, 0, 0, 0};
  for (int64_t i = mine.begin + threadIdx.x; i < mine.end; i += kThreads) {
    const Place at = element_at(p.order, i);
    const double c = read<T, 1>(p.output, mine.sample, at)[0] - offset.x;
    const double u = read<T, 1>(p.unconditional, mine.sample, at)[0] - offset.y;
    sums = {sums.c + c, sums.u + u, fma(c, c, sums.cc), fma(c, u, sums.cu), fma(u, u, sums.uu)};
  }
  sums = block_reduce(sums, AddSums(), Sums{0, 0, 0, 0, 0});
  if (threadIdx.x == 0) parts[blockIdx.x] = sums;
}

// Grid: a warp per sample.
template <typename T>
__global__ void __launch_bounds__(kWarpSize)
    guidance_factors(Problem p, const Sums* parts, int64_t chunks, double rescale, bool remove_parallel, double scale,
                     float2* factors) {
  const int64_t sample = blockIdx.x;
  Sums sums{0, 0, 0, 0, 0};
  for (int64_t i = threadIdx.x; i < chunks; i += kWarpSize) sums = AddSums()(sums, parts[sample * chunks + i]);
  sums = warp_reduce(sums, AddSums());
  if (threadIdx.x != 0) return;
  const double2 offset = sum_offsets<T>(p, sample);
  const double n = static_cast<double>(p.order.size());
  double multiplier = 1, slope = scale - 1;
  if (remove_parallel) {
    const double cc = sums.cc + 2 * offset.x * sums.c + n * offset.x * offset.x;
    const double cu = sums.cu + offset.x * sums.u + offset.y * sums.c + n * offset.x * offset.y;
    multiplier -= slope * ((cc - cu) / (cc < 1e-24 ? 1e-24 : cc));
  }
  if (rescale != 0) {
    const double c_mean = sums.c / n, u_mean = sums.u / n;
    const double c_variance = (sums.cc - n * c_mean * c_mean) / (n - 1);
    const double u_variance = (sums.uu - n * u_mean * u_mean) / (n - 1);
    const double covariance = (sums.cu - n * c_mean * u_mean) / (n - 1);
    const double from_c = multiplier + slope, from_u = -slope;
    const double variance =
        from_c * from_c * c_variance + from_u * from_u * u_variance + 2 * from_c * from_u * covariance;
    const double factor = rescale * sqrt(c_variance / variance) + (1 - rescale);
    multiplier *= factor;
    slope *= factor;
  }
  factors[sample] = {static_cast<float>(multiplier), static_cast<float>(slope)};
}

}  // namespace imagen_fast::sampler_step::device
