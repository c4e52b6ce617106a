// Which instruction set the CPU kernels use: the best one that both this machine and this build have, unless a lower
// one is asked for, by the environment variable IMAGEN_FAST_CPU_CAPABILITY or the operator
// imagen_fast::_set_cpu_capability.
#pragma once

#include "number_formats.h"

namespace imagen_fast {

// Ordered: a machine that has one has all that come before it.
enum class CpuCapability : int { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

CpuCapability cpu_capability();

// The best one that has kernels for tensors of this dtype; see element_types.h.
inline CpuCapability capability_for(DType dtype) {
  const CpuCapability best = cpu_capability();
  if (dtype == DType::kDouble) return CpuCapability::kDefault;
  return dtype != DType::kBFloat16 && best > CpuCapability::kAvx512 ? CpuCapability::kAvx512 : best;
}

}  // namespace imagen_fast

// Each cpu_kernel*.cpp is compiled once per instruction set, in a namespace of its own; setup.py defines
// IMAGEN_FAST_HAS_… for those that the compiler knows. IMAGEN_FAST_DECLARE_KERNEL(signature) declares a function in
// each of them. IMAGEN_FAST_KERNEL(function, dtype) is the one to call on this machine for tensors of a dtype, and
// IMAGEN_FAST_KERNEL_OF(function, capability) that of an instruction set.
#ifdef IMAGEN_FAST_HAS_AVX2
#define IMAGEN_FAST_IF_AVX2(...) __VA_ARGS__
#else
#define IMAGEN_FAST_IF_AVX2(...)
#endif
#ifdef IMAGEN_FAST_HAS_AVX512
#define IMAGEN_FAST_IF_AVX512(...) __VA_ARGS__
#else
#define IMAGEN_FAST_IF_AVX512(...)
#endif
#ifdef IMAGEN_FAST_HAS_AVX512_BF16
#define IMAGEN_FAST_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define IMAGEN_FAST_IF_AVX512_BF16(...)
#endif

// clang-format off
#define IMAGEN_FAST_DECLARE_KERNEL(...)                                  \
  namespace isa_default { __VA_ARGS__; }                                 \
  IMAGEN_FAST_IF_AVX2(namespace isa_avx2 { __VA_ARGS__; })               \
  IMAGEN_FAST_IF_AVX512(namespace isa_avx512 { __VA_ARGS__; })           \
  IMAGEN_FAST_IF_AVX512_BF16(namespace isa_avx512_bf16 { __VA_ARGS__; })

#define IMAGEN_FAST_KERNEL_OF(function, capability)                                                       \
  ([](CpuCapability of) {                                                                                 \
    switch (of) {                                                                                         \
      IMAGEN_FAST_IF_AVX512_BF16(case CpuCapability::kAvx512Bf16: return &isa_avx512_bf16::function;)     \
      IMAGEN_FAST_IF_AVX512(case CpuCapability::kAvx512: return &isa_avx512::function;)                   \
      IMAGEN_FAST_IF_AVX2(case CpuCapability::kAvx2: return &isa_avx2::function;)                         \
      default: return &isa_default::function;                                                             \
    }                                                                                                     \
  }(capability))
#define IMAGEN_FAST_KERNEL(function, dtype) IMAGEN_FAST_KERNEL_OF(function, capability_for(dtype))
// clang-format on
