// What the CUDA library says of itself; in the emulator's library also the options of the emulator.
#include "cuda_tensor.h"

namespace imagen_fast {
namespace {

std::string cuda_library() { return IMAGEN_FAST_CUDA_LIBRARY; }

#ifdef IMAGEN_FAST_EMULATED
void set_emulator_option(std::string name, std::string value) { simt::set_option(name, value); }
#endif

}  // namespace
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CompositeExplicitAutograd, library) {
  library.impl("_cuda_library", TORCH_BOX(&imagen_fast::cuda_library));
#ifdef IMAGEN_FAST_EMULATED
  library.impl("_set_emulator_option", TORCH_BOX(&imagen_fast::set_emulator_option));
#endif
}
