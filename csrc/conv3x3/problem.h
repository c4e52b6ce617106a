// A 3x3 convolution with stride 1 and padding 1 over NHWC, from transformed weights. What the registration hands to the
// kernel of the chosen instruction set.
#pragma once

#include "../common/number_formats.h"

namespace imagen_fast::conv3x3 {

constexpr int64_t kPanelColumns = 64;  // output channels that lie together in the transformed weights
constexpr int64_t kChannelStep = 16;   // channels are a multiple of this

// Of a tile of edge x edge results: its input, and as many products for each pair of channels
constexpr int64_t points_of(int64_t edge) { return (edge + 2) * (edge + 2); }

struct Problem {
  DType dtype;
  int64_t edge;  // of a tile's results: 2 or 4
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t in_channels;
  int64_t out_channels;
  const void* x;        // (batch, height, width, in_channels)
  const float* weight;  // (points, panels, in_channels, kPanelColumns)
  const void* bias;     // (out_channels,) or null
  const void* add;      // as y, or null
  void* y;              // (batch, height, width, out_channels)
};

}  // namespace imagen_fast::conv3x3
