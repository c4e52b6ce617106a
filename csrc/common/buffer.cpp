#include "buffer.h"

#include <stdexcept>
#include <string>

namespace imagen_fast {

void raise_out_of_memory(size_t bytes) {
  throw std::runtime_error("imagen_fast: out of memory: a kernel needs " + std::to_string(bytes) +
                           " bytes of scratch memory");
}

}  // namespace imagen_fast
