// What the forward and the backward kernel share.
#pragma once

#include "../common/buffer.h"
#include "../common/parallel.h"
#include "../common/vec.h"
#include "problem.h"

namespace imagen_fast::IMAGEN_FAST_ISA::channel_rms_norm_act {

using namespace imagen_fast::channel_rms_norm_act;

// Shorter vectors are divided by it.
constexpr double kEps = 1e-12;

// Additions in a row over channels, before their sum joins another one
constexpr int64_t kChain = 64;

// t = xhat * multiplier[c] + offset[c] for the channels of one sample
template <typename S>
class SampleAffine {
 public:
  explicit SampleAffine(const NormProblem& problem) : problem_(problem), values_(2 * problem.channels) {}

  void prepare(int64_t b) {
    if (b == sample_) return;
    sample_ = b;
    for (int64_t c = 0; c < problem_.channels; ++c) {
      const auto affine = channel_affine<S>(problem_.parameters, b, c);
      values_[c] = affine.multiplier;
      values_[problem_.channels + c] = affine.offset;
    }
  }

  const S* multiplier() { return values_.data(); }
  const S* offset() { return values_.data() + problem_.channels; }

 private:
  const NormProblem& problem_;
  Buffer<S> values_;
  int64_t sample_ = -1;
};

}  // namespace imagen_fast::IMAGEN_FAST_ISA::channel_rms_norm_act
