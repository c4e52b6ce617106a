// y = gelu(gate) * value, and its gradients
//
//     dgate = dy * value * gelu'(gate)        dvalue = dy * gelu(gate)
//
// Elementwise: a thread takes one vector of V elements. Block: (threads abreast on a row, rows); the blocks of a row
// come one after another.
#pragma once

#include "../common/cuda_activations.cuh"
#include "../common/cuda_rows.cuh"
#include "plan.h"

namespace imagen_fast::gated_gelu::device {

struct Problem {
  RowGeometry geometry;
  int64_t width;
  int64_t blocks;  // of a row
  bool tanh;       // the approximation of gelu, or the exact one
  RowViews gate;
  RowViews value;
};

struct Forward : Problem {
  MutableRowViews y;
};

// Gradients that are not asked for have no data.
struct Backward : Problem {
  RowViews dy;
  MutableRowViews dgate;
  MutableRowViews dvalue;
};

// Calls function(activation, row, column) for this thread's vector, if there is one.
template <typename T, int V, typename Function>
__device__ __forceinline__ void for_vector(const Problem& p, Function function) {
  const int64_t tile = blockIdx.x / p.blocks;
  const int64_t row = tile * blockDim.y + threadIdx.y;
  const int64_t column = ((blockIdx.x - tile * p.blocks) * blockDim.x + threadIdx.x) * V;
  if (row >= p.geometry.rows || column >= p.width) return;
  if (p.tanh) {
    function(GeluTanh<T>(), row, column);
  } else {
    function(Gelu<T>(), row, column);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads) forward(Forward f) {
  for_vector<T, V>(f, [&](auto activation, int64_t row, int64_t column) {
    const Vector<T, V> gate = load<V>(row_at<T>(f.geometry, f.gate, row) + column);
    const Vector<T, V> value = load<V>(row_at<T>(f.geometry, f.value, row) + column);
    Vector<T, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = from_float<T>(activation.value(to_float(gate[i])) * to_float(value[i]));
    store<V>(row_at<T>(f.geometry, f.y, row) + column, y);
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads) backward(Backward f) {
  for_vector<T, V>(f, [&](auto activation, int64_t row, int64_t column) {
    const Vector<T, V> dy = load<V>(row_at<T>(f.geometry, f.dy, row) + column);
    const Vector<T, V> gate = load<V>(row_at<T>(f.geometry, f.gate, row) + column);
    Vector<T, V> result;
    if (f.dgate.data) {
      const Vector<T, V> value = load<V>(row_at<T>(f.geometry, f.value, row) + column);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        result[i] = from_float<T>(to_float(dy[i]) * to_float(value[i]) * activation.slope(to_float(gate[i])));
      }
      store<V>(row_at<T>(f.geometry, f.dgate, row) + column, result);
    }
    if (f.dvalue.data) {
#pragma unroll
      for (int i = 0; i < V; ++i) result[i] = from_float<T>(to_float(dy[i]) * activation.value(to_float(gate[i])));
      store<V>(row_at<T>(f.geometry, f.dvalue, row) + column, result);
    }
  });
}

}  // namespace imagen_fast::gated_gelu::device
