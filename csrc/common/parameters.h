// The parameters of a norm as the CPU kernels see them, t = xhat * weight * (1 + scale) + bias * (1 + scale) + shift,
// and their gradients. No torch header may be included here (see number_formats.h).
#pragma once

#include <cstdint>
#include <initializer_list>

#include "number_formats.h"

namespace imagen_fast {

// (C,) or (B, C) in any strides; absent if data is null.
struct Parameter {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t stride_b = 0;
  int64_t stride_c = 0;
};

struct Parameters {
  Parameter weight, bias, scale, shift;
};

// Contiguous, in the parameter's dtype; not asked for if data is null.
struct ParameterGradient {
  void* data = nullptr;
  DType dtype = DType::kFloat;
};

struct ParameterGradients {
  ParameterGradient weight, bias, scale, shift;

  // Whether one is asked for that keeps more of a sum than bf16 does.
  bool are_finer_than_bfloat16() const {
    for (const ParameterGradient& gradient : {weight, bias, scale, shift}) {
      if (gradient.data && gradient.dtype != DType::kBFloat16) return true;
    }
    return false;
  }
};

}  // namespace imagen_fast

#ifdef IMAGEN_FAST_ISA
#include "parallel.h"

namespace imagen_fast::IMAGEN_FAST_ISA {

template <typename S>
inline S read(const Parameter& parameter, int64_t b, int64_t c, S absent) {
  if (!parameter.data) return absent;
  const int64_t i = b * parameter.stride_b + c * parameter.stride_c;
  switch (parameter.dtype) {
    case DType::kHalf: return widen(static_cast<const Half*>(parameter.data)[i]);
    case DType::kBFloat16: return widen(static_cast<const BFloat16*>(parameter.data)[i]);
    case DType::kFloat: return static_cast<const float*>(parameter.data)[i];
    default: return static_cast<S>(static_cast<const double*>(parameter.data)[i]);
  }
}

inline void write(const ParameterGradient& gradient, int64_t i, double value) {
  const float single = static_cast<float>(value);
  switch (gradient.dtype) {
    case DType::kHalf: return narrow(single, static_cast<Half*>(gradient.data) + i);
    case DType::kBFloat16: return narrow(single, static_cast<BFloat16*>(gradient.data) + i);
    case DType::kFloat: return narrow(single, static_cast<float*>(gradient.data) + i);
    default: return narrow(value, static_cast<double*>(gradient.data) + i);
  }
}

// t = xhat * multiplier + offset
template <typename S>
struct Affine {
  S multiplier;
  S offset;
};

template <typename S>
inline Affine<S> channel_affine(const Parameters& p, int64_t b, int64_t c) {
  const S scale = S(1) + read(p.scale, b, c, S(0));
  const S weight = read(p.weight, 0, c, S(1));
  const S bias = read(p.bias, 0, c, S(0));
  return {weight * scale, bias * scale + read(p.shift, b, c, S(0))};
}

// Sums over the positions of one (sample, channel)
struct ChannelSums {
  double dt;
  double dt_xhat;
};

// The gradients of a norm's parameters from sums[b * channels + c]; samples are added in order.
template <typename S>
inline void parameter_gradients(const Parameters& p, const ParameterGradients& gradients, const ChannelSums* sums,
                                int64_t batch, int64_t channels) {
  constexpr int64_t kElements = 16;  // of a tensor, that take as long as one (sample, channel) here
  parallel_for(channels, batch * kElements, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const double weight = read(p.weight, 0, c, S(1));
      const double bias = read(p.bias, 0, c, S(0));
      // Only where there is a bias: 0 times an infinite sum would be NaN.
      const auto dscale = [&](const ChannelSums& sum) {
        return p.bias.data ? weight * sum.dt_xhat + bias * sum.dt : weight * sum.dt_xhat;
      };
      double dweight = 0;
      double dbias = 0;
      for (int64_t b = 0; b < batch; ++b) {
        const ChannelSums& sum = sums[b * channels + c];
        const double scale = 1 + static_cast<double>(read(p.scale, b, c, S(0)));
        dweight += scale * sum.dt_xhat;
        dbias += scale * sum.dt;
        if (gradients.scale.data) write(gradients.scale, b * channels + c, dscale(sum));
        if (gradients.shift.data) write(gradients.shift, b * channels + c, sum.dt);
      }
      if (gradients.weight.data) write(gradients.weight, c, dweight);
      if (gradients.bias.data) write(gradients.bias, c, dbias);
    }
  });
}

}  // namespace imagen_fast::IMAGEN_FAST_ISA
#endif
