// Whether attention multiplies bf16 by matrix tiles (AMX).
#pragma once

#include <cstdint>

namespace imagen_fast::attention {

enum class MatrixTiles : uint8_t { kNone, kHardware, kEmulated };

// What the operator imagen_fast::_set_matrix_tiles has asked for: at first the machine's own tiles where it has some
// and the operating system lets this process use them, which is asked of it once.
MatrixTiles matrix_tiles();

}  // namespace imagen_fast::attention
