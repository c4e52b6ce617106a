// gated_gelu on the CPU, and its gradient: dgate = dy * value * gelu'(gate), dvalue = dy * gelu(gate). Compiled once
// per instruction set.
#include "../common/activations.h"
#include "../common/element_types.h"
#include "../common/parallel.h"
#include "../common/rows.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA {
namespace {

constexpr int64_t kPart = 1024;  // elements of a row that are one task

// function(row, first element, number of elements) over all rows, in parallel
template <typename Function>
void for_each_part(const imagen_fast::gated_gelu::Problem& p, Function&& function) {
  const int64_t parts = (p.width + kPart - 1) / kPart;
  parallel_for(p.outer * p.inner * parts, p.width < kPart ? p.width : kPart, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % parts * kPart;
      function(task / parts, first, p.width - first < kPart ? p.width - first : kPart);
    }
  });
}

template <typename T, typename Act>
void forward(const imagen_fast::gated_gelu::Forward& f) {
  using S = AccumulateType<T>;
  for_each_part(f, [&](int64_t r, int64_t first, int64_t n) {
    const T* gate = row<T>(f.gate, r, f.inner) + first;
    const T* value = row<T>(f.value, r, f.inner) + first;
    T* y = row<T>(f.y, r, f.inner) + first;
    for_each_vector<S>(n, [&](int64_t i, auto lanes) {
      store(Act::template value<T>(load(gate + i, lanes)) * load(value + i, lanes), y + i, lanes);
    });
  });
}

template <typename T, typename Act>
void backward(const imagen_fast::gated_gelu::Backward& b) {
  using S = AccumulateType<T>;
  for_each_part(b, [&](int64_t r, int64_t first, int64_t n) {
    const T* gate = row<T>(b.gate, r, b.inner) + first;
    const T* dy = row<T>(b.dy, r, b.inner) + first;
    if (b.dgate.data) {
      const T* value = row<T>(b.value, r, b.inner) + first;
      T* dgate = row<T>(b.dgate, r, b.inner) + first;
      for_each_vector<S>(n, [&](int64_t i, auto lanes) {
        const auto dgelu = load(dy + i, lanes) * load(value + i, lanes);
        store(dgelu * Act::template slope<T>(load(gate + i, lanes)), dgate + i, lanes);
      });
    }
    if (b.dvalue.data) {
      T* dvalue = row<T>(b.dvalue, r, b.inner) + first;
      for_each_vector<S>(n, [&](int64_t i, auto lanes) {
        store(load(dy + i, lanes) * Act::template value<T>(load(gate + i, lanes)), dvalue + i, lanes);
      });
    }
  });
}

struct RunForward {
  const imagen_fast::gated_gelu::Forward& f;
  template <typename T, typename Act>
  void run() const {
    forward<T, Act>(f);
  }
};

struct RunBackward {
  const imagen_fast::gated_gelu::Backward& b;
  template <typename T, typename Act>
  void run() const {
    backward<T, Act>(b);
  }
};

template <typename T, typename Runner>
void dispatch_gelu(bool tanh, const Runner& runner) {
  tanh ? runner.template run<T, GeluTanh>() : runner.template run<T, Gelu>();
}

template <typename Runner>
void dispatch(const imagen_fast::gated_gelu::Problem& p, const Runner& runner) {
  with_element_type(p.dtype, [&](auto element) { dispatch_gelu<decltype(element)>(p.tanh, runner); });
}

}  // namespace

void gated_gelu_forward(const imagen_fast::gated_gelu::Forward& f) { dispatch(f, RunForward{f}); }
void gated_gelu_backward(const imagen_fast::gated_gelu::Backward& b) { dispatch(b, RunBackward{b}); }

}  // namespace imagen_fast::IMAGEN_FAST_ISA
