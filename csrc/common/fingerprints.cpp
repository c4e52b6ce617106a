// What tells a tensor from others and from itself at another time: where it lies, its sizes and strides, and a few of
// its numbers. The schema is in imagen_fast/_native.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "tensor.h"

namespace imagen_fast {
namespace {

constexpr int64_t kSamples = 8;

// address, layout, numbers
constexpr int64_t kWidth = 2 + kSamples;

// FNV-1a, by whole numbers
int64_t mixed(int64_t hash, int64_t value) {
  return static_cast<int64_t>((static_cast<uint64_t>(hash) ^ static_cast<uint64_t>(value)) * 0x100000001b3u);
}

void write(const Tensor& tensor, int64_t* row) {
  std::fill(row, row + kWidth, 0);
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t layout = mixed(static_cast<int64_t>(0xcbf29ce484222325u), dtype_code(tensor));
  int64_t extent = 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    layout = mixed(mixed(layout, sizes[i]), strides[i]);
    extent += (sizes[i] - 1) * strides[i];
  }
  row[0] = reinterpret_cast<int64_t>(tensor.const_data_ptr());
  row[1] = layout;
  if (tensor.numel() == 0 || !tensor.is_cpu()) return;
  const int64_t bytes = static_cast<int64_t>(tensor.element_size());
  const int64_t step = std::max<int64_t>(1, extent / kSamples);
  const char* first = static_cast<const char*>(tensor.const_data_ptr());
  for (int64_t i = 0; i < std::min(kSamples, extent); ++i) {
    std::memcpy(row + 2 + i, first + i * step * bytes, static_cast<size_t>(std::min<int64_t>(bytes, 8)));
  }
}

Tensor fingerprints(std::vector<Tensor> tensors) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  Tensor rows = uninitialized_matrix(count, kWidth, aoti_torch_dtype_int64());
  int64_t* row = static_cast<int64_t*>(rows.mutable_data_ptr());
  for (const Tensor& tensor : tensors) {
    write(tensor, row);
    row += kWidth;
  }
  return rows;
}

}  // namespace
}  // namespace imagen_fast

STABLE_TORCH_LIBRARY_IMPL(imagen_fast, CompositeExplicitAutograd, library) {
  library.impl("_fingerprints", TORCH_BOX(&imagen_fast::fingerprints));
}
