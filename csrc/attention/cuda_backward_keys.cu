#include "launches.h"

namespace imagen_fast::attention {

void launch_backward_keys(DType dtype, const device::KeyGradients& f, int64_t batch, Stream stream) {
  const int keys = f.of_own ? f.own.count : f.context.count;
  device::with_type_and_width(dtype, f.width, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    const device::Tiles tiles = device::plan_keys<T, W>(f, f.of_own, batch, device_properties());
    device::KeyGradients planned = f;
    planned.stages = tiles.stages;
    const int64_t blocks = batch * f.kv_heads * ceil_div(keys, 16 * tiles.warps);
    const LaunchConfig config = launch_config(blocks, tiles.warps, tiles.shared_bytes, stream);
    if constexpr (W <= 128) {
      launch(config, device::backward_keys<T, W, true, true>, planned);
    } else {  // registers hold one of the two
      if (f.dk.data) launch(config, device::backward_keys<T, W, true, false>, planned);
      if (f.dv.data) launch(config, device::backward_keys<T, W, false, true>, planned);
    }
  });
}

}  // namespace imagen_fast::attention
