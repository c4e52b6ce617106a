#include "launches.h"

namespace imagen_fast::attention {

void launch_backward_bias(DType dtype, const device::BiasGradients& f, Stream stream) {
  device::with_type_and_width(dtype, f.width, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    const device::Tiles tiles = device::plan_bias<T, W>(f, device_properties());
    device::BiasGradients planned = f;
    planned.stages = tiles.stages;
    const int64_t query_blocks = f.dbias.queries > 1 ? ceil_div(f.queries, 16 * tiles.warps) : 1;
    const int64_t blocks =
        f.dbias.batch * f.dbias.heads * query_blocks * device::key_tiles(f, device::kStreamRows<T, W>);
    launch(launch_config(blocks, tiles.warps, tiles.shared_bytes, stream), device::backward_bias<T, W>, planned);
  });
}

}  // namespace imagen_fast::attention
