// Element types in kernels: everything is computed in float, and rounded once, at the store.
#pragma once

#include "number_formats.h"

namespace imagen_fast {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "from_float<T>: T is float, __half or __nv_bfloat16");
    return __float2bfloat16_rn(value);
  }
}

// Two 16-bit elements in a register, the first in the low half, as the matrix instructions take them
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(sizeof(T) == 2, "pack2 takes 16-bit types");
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t packed;
  memcpy(&packed, pair, sizeof(packed));
  return packed;
}
template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
  static_assert(sizeof(T) == 2, "unpack2 takes 16-bit types");
  T pair[2];
  memcpy(pair, &packed, sizeof(packed));
  return float2{to_float(pair[0]), to_float(pair[1])};
}

// One element of a tensor whose type is known at run time alone: for parameters, of which a thread takes few
__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kHalf: return to_float(static_cast<const __half*>(data)[index]);
    case DType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    default: return static_cast<const float*>(data)[index];
  }
}

__device__ __forceinline__ void store_float(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kHalf: static_cast<__half*>(data)[index] = from_float<__half>(value); return;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value); return;
    default: static_cast<float*>(data)[index] = value; return;
  }
}

template <typename T>
struct TypeTag {
  using type = T;
};

// For launchers: calls function(TypeTag<T>()) with the type T of device code that `dtype` names, not double.
template <typename Function>
auto with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kHalf: return function(TypeTag<__half>());
    case DType::kBFloat16: return function(TypeTag<__nv_bfloat16>());
    default: return function(TypeTag<float>());
  }
}

}  // namespace imagen_fast
