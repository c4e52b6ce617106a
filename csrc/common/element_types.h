// Which element types an instruction set has kernels for. Each takes long to compile, so only those are compiled that
// gain by the instructions: double by none of them, and from those for bf16 nothing but bf16. `capability_for` says the
// same to whoever calls a kernel.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "number_formats.h"

#ifdef IMAGEN_FAST_ISA
namespace imagen_fast::IMAGEN_FAST_ISA {

template <typename T>
constexpr bool kHasKernels =
#if defined(__AVX512BF16__)
    std::is_same_v<T, BFloat16>;
#elif defined(__AVX2__)
    !std::is_same_v<T, double>;
#else
    true;
#endif

template <typename T, typename Function>
inline void call_with(Function&& function) {
  if constexpr (kHasKernels<T>) {
    function(T{});
  } else {
    std::abort();  // `capability_for` has not been asked
  }
}

// function(T{}) for the T of this dtype
template <typename Function>
inline void with_element_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kHalf: return call_with<Half>(function);
    case DType::kBFloat16: return call_with<BFloat16>(function);
    case DType::kFloat: return call_with<float>(function);
    case DType::kDouble: return call_with<double>(function);
  }
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
#endif
