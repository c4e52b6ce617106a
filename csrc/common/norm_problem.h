// y = act(xhat * weight * (1 + scale) + bias * (1 + scale) + shift), xhat = x normalised in one way or another: what
// the registration of a norm hands to the kernel of the chosen instruction set.
#pragma once

#include <cstdint>

#include "activation_codes.h"
#include "number_formats.h"
#include "parameters.h"

namespace imagen_fast {

struct NormProblem {
  DType dtype;         // of x, y and their gradients
  bool channels_last;  // x is [batch][positions][channels] in memory, else [batch][channels][positions]
  int64_t batch;
  int64_t channels;
  int64_t positions;
  Activation activation;
  Parameters parameters;
};

}  // namespace imagen_fast

#ifdef IMAGEN_FAST_ISA
#include "activations.h"
#include "element_types.h"

namespace imagen_fast::IMAGEN_FAST_ISA {

// function.operator()<T, Activation>() for the problem's dtype and activation
template <typename T, typename Function>
inline void dispatch_activation(const NormProblem& problem, Function&& function) {
  switch (problem.activation) {
    case Activation::kSilu: return function.template operator()<T, Silu>();
    case Activation::kGelu: return function.template operator()<T, Gelu>();
    case Activation::kGeluTanh: return function.template operator()<T, GeluTanh>();
    default: return function.template operator()<T, Identity>();
  }
}

template <typename Function>
inline void dispatch(const NormProblem& problem, Function&& function) {
  with_element_type(problem.dtype, [&](auto element) { dispatch_activation<decltype(element)>(problem, function); });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
#endif
