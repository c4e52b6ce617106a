#include "matrix_tiles.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace imagen_fast::attention {
namespace {

constexpr const char* kNames[] = {"none", "hardware", "emulated"};

// The state of the tiles is 8 KB that Linux saves only for processes that have asked for it; without, the first tile
// instruction is a SIGILL.
bool permitted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool have_tiles() {
  static const bool have = permitted();
  return have;
}

std::atomic<MatrixTiles>& current() {
  static std::atomic<MatrixTiles> tiles{have_tiles() ? MatrixTiles::kHardware : MatrixTiles::kNone};
  return tiles;
}

std::string get_matrix_tiles() { return kNames[static_cast<int>(matrix_tiles())]; }

void set_matrix_tiles(std::string name) {
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    const auto tiles = static_cast<MatrixTiles>(i);
    if (tiles == MatrixTiles::kHardware && !have_tiles()) {
      throw std::runtime_error("this machine has no matrix tiles, or its operating system does not permit them");
    }
    current() = tiles;
    return;
  }
  throw std::runtime_error("matrix tiles can be none, hardware or emulated, not " + name);
}

}  // namespace

MatrixTiles matrix_tiles() { return current().load(std::memory_order_relaxed); }

}  // namespace imagen_fast::attention

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CompositeExplicitAutograd, library) {
  library.impl("_matrix_tiles", TORCH_BOX(&imagen_fast::attention::get_matrix_tiles));
  library.impl("_set_matrix_tiles", TORCH_BOX(&imagen_fast::attention::set_matrix_tiles));
}
