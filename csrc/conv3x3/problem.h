// A 3x3 convolution with stride 1 and padding 1 over NHWC, from transformed weights. What the registration hands to the
// kernel of the chosen instruction set.
#pragma once

#include "../common/number_formats.h"

namespace imagen_fast::conv3x3 {

constexpr int64_t kPoints = 36;        // of a transformed tile, 6 x 6
constexpr int64_t kPanelColumns = 64;  // output channels that lie together in the transformed weights
constexpr int64_t kChannelStep = 16;   // channels are a multiple of this

struct Problem {
  DType dtype;
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t in_channels;
  int64_t out_channels;
  const void* x;        // (batch, height, width, in_channels)
  const float* weight;  // (kPoints, panels, in_channels, kPanelColumns)
  const void* bias;     // (out_channels,) or null
  const void* add;      // as y, or null
  void* y;              // (batch, height, width, out_channels)
};

}  // namespace imagen_fast::conv3x3
