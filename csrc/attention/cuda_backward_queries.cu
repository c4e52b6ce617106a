#include "launches.h"

namespace imagen_fast::attention {
namespace {

template <bool kQueries>
void launch_pass(DType dtype, const device::QueryGradients& f, int64_t batch, Stream stream) {
  device::with_type_and_width(dtype, f.width, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int W = decltype(width)::value;
    const device::Tiles tiles = device::plan_queries<T, W>(f, f.dtable != nullptr, batch, device_properties());
    device::QueryGradients planned = f;
    planned.stages = tiles.stages;
    const int64_t blocks = batch * f.q_heads * ceil_div(f.queries, 16 * tiles.warps);
    launch(launch_config(blocks, tiles.warps, tiles.shared_bytes, stream), device::backward_queries<T, W, kQueries>,
           planned);
  });
}

}  // namespace

void launch_statistics(DType dtype, const device::Backward& f, int64_t batch, Stream stream) {
  device::QueryGradients statistics{};
  static_cast<device::Backward&>(statistics) = f;
  launch_pass<false>(dtype, statistics, batch, stream);
}

void launch_backward_queries(DType dtype, const device::QueryGradients& f, int64_t batch, Stream stream) {
  launch_pass<true>(dtype, f, batch, stream);
}

}  // namespace imagen_fast::attention
