#pragma once

#include <cstdint>

namespace imagen_fast {

// The codes of the operators' `activation` argument
enum class Activation : int64_t { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3 };

}  // namespace imagen_fast
