// How attention's CUDA kernels cut a problem into tiles for a device.
//
// A block has 16 rows for each of its warps (32 in the large tiles of the forward pass): as many as 128 where there are
// more than 64 and such blocks fill the device, so that few rows do not pay for many, and fewer where shared memory is
// short. A row's result does not depend on the tile that it is in.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "kernel_backward_bias.cuh"
#include "kernel_backward_keys.cuh"
#include "kernel_forward.cuh"

namespace imagen_fast::attention::device {

struct Tiles {
  int warps;
  int stages;
  int shared_bytes;
};

constexpr int kSmallTile = 64;
constexpr int kLargeTile = 128;

inline bool is_worth_large_tiles(int rows, int64_t heads, const DeviceProperties& device) {
  return rows > kSmallTile && heads * ceil_div(rows, kLargeTile) >= device.multiprocessors;
}

// The best that fits: bytes(warps, stages) is what a block takes.
template <typename Bytes>
Tiles fit(int most_warps, const DeviceProperties& device, Bytes bytes) {
  constexpr std::pair<int, int> kChoices[] = {{8, 2}, {4, 2}, {4, 1}, {2, 2}, {2, 1}, {1, 2}, {1, 1}};
  for (const auto& [warps, stages] : kChoices) {
    const int taken = std::min(warps, most_warps);
    if (warps > most_warps && warps > 4) continue;
    if (bytes(taken, stages) <= device.shared_bytes_per_block) return {taken, stages, bytes(taken, stages)};
  }
  return {0, 0, 0};  // not on any device: see the smallest choice
}

// The warps of a tile of up to 64 rows
inline int few_warps(int rows) { return std::clamp(ceil_div(rows, 16), 1, kSmallTile / 16); }

struct ForwardPlan {
  int row_tiles;  // of 16 rows to a warp
  Tiles tiles;
};

template <typename T, int W>
ForwardPlan plan_forward(const Problem& p, bool normalized, int64_t batch, const DeviceProperties& device) {
  const auto bytes = [&](int row_tiles) {
    return [&p, normalized, row_tiles](int warps, int stages) {
      return forward_shared<T, W>(16 * row_tiles * warps, stages, p.bias.data, normalized, p.relative.data).bytes;
    };
  };
  int warps = few_warps(p.queries);
  if (sizeof(T) == 2 && W <= 128 && is_worth_large_tiles(p.queries, batch * p.q_heads, device)) {
    if (W == 64) return {2, fit(warps, device, bytes(2))};
    warps = kLargeTile / 16;
  }
  return {1, fit(warps, device, bytes(1))};
}

template <typename T, int W>
Tiles plan_queries(const Problem& p, bool dtable, int64_t batch, const DeviceProperties& device) {
  const bool large = is_worth_large_tiles(p.queries, batch * p.q_heads, device);
  return fit(large ? kLargeTile / 16 : few_warps(p.queries), device, [&](int warps, int stages) {
    return query_shared<T, W>(16 * warps, stages, p.bias.data, p.relative.data, dtable).bytes;
  });
}

template <typename T, int W>
Tiles plan_keys(const Problem& p, bool of_own, int64_t batch, const DeviceProperties& device) {
  const int keys = of_own ? p.own.count : p.context.count;
  const bool large = is_worth_large_tiles(keys, batch * p.kv_heads, device);
  return fit(large ? kLargeTile / 16 : few_warps(keys), device, [&](int warps, int stages) {
    return key_shared<T, W>(16 * warps, stages, p.bias.data, of_own && p.relative.data).bytes;
  });
}

template <typename T, int W>
Tiles plan_bias(const Problem& p, const DeviceProperties& device) {
  return fit(few_warps(p.queries), device,
             [](int warps, int stages) { return bias_shared<T, W>(16 * warps, stages).bytes; });
}

// The widths of tiles: a head's is the next of them.
template <typename Function>
auto with_width(int width, Function&& function) {
  if (width <= 64) return function(std::integral_constant<int, 64>());
  if (width <= 128) return function(std::integral_constant<int, 128>());
  return function(std::integral_constant<int, 256>());
}

template <typename Function>
auto with_type_and_width(DType dtype, int width, Function&& function) {
  return with_type(dtype, [&](auto type) { return with_width(width, [&](auto w) { return function(type, w); }); });
}

}  // namespace imagen_fast::attention::device
