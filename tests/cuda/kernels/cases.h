// Kernels that the emulator is tested with: each case launches one, and throws if the result is wrong.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda.cuh"

namespace imagen_fast {

std::map<std::string, void (*)()>& cases();

struct Case {
  Case(const char* name, void (*run)()) { cases()[name] = run; }
};

// CASE(name) { … }
#define CASE(name)                                \
  static void name();                             \
  static const Case register_##name(#name, name); \
  static void name()

inline void expect(bool right, const std::string& message) {
  if (!right) throw std::runtime_error("wrong: " + message);
}

// Memory whose ends AddressSanitizer knows
template <typename T>
using Array = std::vector<T>;

inline Array<float> numbers(int n, float first = 0) {
  Array<float> result(n);
  for (int i = 0; i < n; ++i) result[i] = first + static_cast<float>(i);
  return result;
}

inline LaunchConfig blocks_of(unsigned grid, unsigned block, size_t shared_bytes = 0) {
  LaunchConfig config;
  config.grid = grid;
  config.block = block;
  config.shared_bytes = shared_bytes;
  return config;
}

}  // namespace imagen_fast
