#include "launches.h"

namespace imagen_fast::attention {

void launch_forward(DType dtype, const device::Forward& f, int64_t batch, Stream stream) {
  device::with_type_and_width(dtype, f.width, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    const device::ForwardPlan plan = device::plan_forward<T, W>(f, f.q_scale.data, batch, device_properties());
    device::Forward planned = f;
    planned.stages = plan.tiles.stages;
    const int64_t blocks = batch * f.q_heads * ceil_div(f.queries, 16 * plan.row_tiles * plan.tiles.warps);
    const LaunchConfig config = launch_config(blocks, plan.tiles.warps, plan.tiles.shared_bytes, stream);
    if constexpr (sizeof(T) == 2 && W == 64) {
      if (plan.row_tiles == 2) return launch(config, device::forward<T, W, 2>, planned);
    }
    launch(config, device::forward<T, W, 1>, planned);
  });
}

}  // namespace imagen_fast::attention
