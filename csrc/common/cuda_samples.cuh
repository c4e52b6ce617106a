// Samples of several tensors (B, C, positions...), walked over together in the order in which one of them, which is
// dense in NCHW or NHWC, lies in memory. Where all of them lie so, and are aligned, 16 bytes are accessed at a time.
#pragma once

#include "cuda.cuh"
#include "views.h"

namespace imagen_fast {

// The order of a sample's elements: channels, then positions; or, with channels last, positions, then channels.
struct SampleOrder {
  int64_t channels;
  int64_t positions;
  bool channels_last;

  __host__ __device__ int64_t size() const { return channels * positions; }
};

// The elements number first, ..., first + count - 1 in that order. If they are taken one by one, also where it is.
struct Place {
  int64_t first;
  int count;
  int64_t channel;
  int64_t position;
};

template <int N>
struct Floats {
  float data[N];

  __device__ __forceinline__ float& operator[](int i) { return data[i]; }
  __device__ __forceinline__ float operator[](int i) const { return data[i]; }
};

template <int N>
__device__ __forceinline__ Floats<N> all_floats(float value) {
  Floats<N> result;
#pragma unroll
  for (int k = 0; k < N; ++k) result[k] = value;
  return result;
}

// sum += coefficient * x
template <int N>
__device__ __forceinline__ void add_product(Floats<N>& sum, float coefficient, const Floats<N>& x) {
#pragma unroll
  for (int k = 0; k < N; ++k) sum[k] = fmaf(coefficient, x[k], sum[k]);
}

// A place of a single element
__device__ __forceinline__ Place element_at(const SampleOrder& order, int64_t i) {
  const int64_t inner = order.channels_last ? order.channels : order.positions;
  int64_t outer;
  if (order.size() < int64_t{1} << 32) {  // a division of 64 bits takes many times as long
    outer = static_cast<uint32_t>(i) / static_cast<uint32_t>(inner);
  } else {
    outer = i / inner;
  }
  const int64_t rest = i - outer * inner;
  return order.channels_last ? Place{i, 1, rest, outer} : Place{i, 1, outer, rest};
}

template <int V>
__device__ __forceinline__ Place place_at(const SampleOrder& order, int64_t first, int64_t end) {
  if constexpr (V == 1) return element_at(order, first);
  return {first, static_cast<int>(end - first < V ? end - first : V), 0, 0};
}

// With V > 1 every sample of the view lies in the order, and at a multiple of 16 bytes. What is past `count` is 0.
template <typename T, int V>
__device__ __forceinline__ Floats<V> read(const View& view, int64_t sample, const Place& at) {
  const T* from = static_cast<const T*>(view.data) + sample * view.stride_b;
  Floats<V> result;
  if constexpr (V == 1) {
    result[0] = to_float(from[at.channel * view.stride_c + at.position * view.stride_p]);
  } else if (at.count == V) {
    const Vector<T, V> vector = load<V>(from + at.first);
#pragma unroll
    for (int k = 0; k < V; ++k) result[k] = to_float(vector[k]);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) result[k] = k < at.count ? to_float(from[at.first + k]) : 0.0f;
  }
  return result;
}

// To a tensor that lies in the order, its samples one after the other
template <typename T, int V>
__device__ __forceinline__ void write(T* to, const Place& at, const Floats<V>& value) {
  if (at.count == V) {
    Vector<T, V> vector;
#pragma unroll
    for (int k = 0; k < V; ++k) vector[k] = from_float<T>(value[k]);
    store<V>(to + at.first, vector);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (k < at.count) to[at.first + k] = from_float<T>(value[k]);
    }
  }
}

// ---- For launchers

inline bool lies_in(const SampleOrder& order, const View& view) {
  const int64_t channel = order.channels_last ? 1 : order.positions;
  const int64_t position = order.channels_last ? order.channels : 1;
  return (order.channels == 1 || view.stride_c == channel) && (order.positions == 1 || view.stride_p == position);
}

// Whether `read` can take the view 16 bytes at a time; so it can what is not there.
inline bool reads_vectors(const SampleOrder& order, const View& view, int64_t batch, int element_bytes) {
  if (!view.data) return true;
  const bool samples_aligned = batch == 1 || view.stride_b * element_bytes % 16 == 0;
  return lies_in(order, view) && samples_aligned && is_aligned(view.data, 16);
}

// The order in which a sample lies in memory; it must be dense.
inline bool order_of(const View& view, int64_t channels, int64_t positions, SampleOrder* order) {
  for (const bool channels_last : {false, true}) {
    *order = {channels, positions, channels_last};
    if (lies_in(*order, view)) return true;
  }
  return false;
}

}  // namespace imagen_fast
