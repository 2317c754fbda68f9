// The activations of megakern/ops/activation.py for results that are rounded to 16 bits: exp and 1/x by the hardware's
// approximations, 2 ulp of fp32 each. activation.cu has the ones for fp32 results. NaN stays NaN.
#pragma once

#include "device/platform.cuh"

namespace megakern {

template <Activation kind>
MK_DEVICE float activate(float x) {
  if constexpr (kind == Activation::gelu) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  else if constexpr (kind == Activation::relu_squared) return x < 0.0f ? 0.0f : x * x;
  else {
    // (1 + tanh(u)) / 2 = sigmoid(2 u), without the cancellation
    const float twice = kind == Activation::silu ? x : 1.5957691216057308f * x * (1.0f + 0.044715f * x * x);
    return x * rcp_approx(1.0f + exp_approx(-twice));
  }
}

// One branch for many values.
template <int N>
MK_DEVICE void activate_all(float (&v)[N], Activation kind) {
#define MK_KIND(name) \
  case Activation::name: _Pragma("unroll") for (int i = 0; i < N; ++i) v[i] = activate<Activation::name>(v[i]); break
  switch (kind) {
    MK_KIND(gelu);
    MK_KIND(gelu_tanh);
    MK_KIND(relu_squared);
    MK_KIND(silu);
  }
#undef MK_KIND
}

}  // namespace megakern
