#include "cpu_capability.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace imagen_fast {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

CpuCapability best_capability() {
#if defined(__x86_64__)
  [[maybe_unused]] const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                       __builtin_cpu_supports("avx512dq");
  IMAGEN_FAST_IF_AVX512_BF16(if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuCapability::kAvx512Bf16;)
  IMAGEN_FAST_IF_AVX512(if (avx512) return CpuCapability::kAvx512;)
  IMAGEN_FAST_IF_AVX2(if (avx2) return CpuCapability::kAvx2;)
#endif
  return CpuCapability::kDefault;
}

CpuCapability parse(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best_capability()); ++i) {
    if (name == kNames[i]) return static_cast<CpuCapability>(i);
  }
  std::string offered;
  for (int i = 0; i <= static_cast<int>(best_capability()); ++i) offered += std::string(i ? ", " : "") + kNames[i];
  throw std::runtime_error("CPU capability '" + name + "' is not one that this machine and build have: " + offered);
}

CpuCapability initial_capability() {
  const char* asked = std::getenv("IMAGEN_FAST_CPU_CAPABILITY");
  return asked && *asked ? parse(asked) : best_capability();
}

std::atomic<CpuCapability>& current() {
  static std::atomic<CpuCapability> capability{initial_capability()};
  return capability;
}

std::string get_cpu_capability() { return kNames[static_cast<int>(cpu_capability())]; }

void set_cpu_capability(std::string name) { current() = parse(name); }

}  // namespace

CpuCapability cpu_capability() { return current().load(std::memory_order_relaxed); }

}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CompositeExplicitAutograd, library) {
  library.impl("_cpu_capability", TORCH_BOX(&imagen_fast::get_cpu_capability));
  library.impl("_set_cpu_capability", TORCH_BOX(&imagen_fast::set_cpu_capability));
}
