// y = sqrt(alpha) x0 + sqrt(1 - alpha) noise, alpha by sample: a block takes a chunk of a sample.
#pragma once

#include "../common/cuda_samples.cuh"

namespace imagen_fast::add_noise::device {

constexpr int kThreads = 256;

struct Problem {
  SampleOrder order;  // of x0 and y
  View x0, noise;
  void* y;
  const double* alphas;  // (alpha_count,)
  int64_t alpha_count;
  const int64_t* timesteps;  // (batch,)
  int64_t chunks;            // of a sample
  int64_t chunk;             // elements, a multiple of those in 16 bytes
};

// Grid: a block per chunk, counted by chunk, then sample.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) add_noise(Problem p) {
  const int64_t sample = blockIdx.x / p.chunks;
  const int64_t begin = blockIdx.x % p.chunks * p.chunk;
  const int64_t size = p.order.size();
  const int64_t end = begin + p.chunk < size ? begin + p.chunk : size;
  const int64_t timestep = p.timesteps[sample];
  const bool known = timestep >= 0 && timestep < p.alpha_count;
  const double alpha = known ? p.alphas[timestep] : static_cast<double>(__uint_as_float(0x7fffffffu));
  const float signal = static_cast<float>(sqrt(alpha)), deviation = static_cast<float>(sqrt(1 - alpha));
  T* y = static_cast<T*>(p.y) + sample * size;
  for (int64_t i = begin + V * static_cast<int64_t>(threadIdx.x); i < end; i += V * kThreads) {
    const Place at = place_at<V>(p.order, i, end);
    const Floats<V> x0 = read<T, V>(p.x0, sample, at), noise = read<T, V>(p.noise, sample, at);
    Floats<V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) result[k] = fmaf(x0[k], signal, __fmul_rn(noise[k], deviation));
    write<T, V>(y, at, result);
  }
}

}  // namespace imagen_fast::add_noise::device
