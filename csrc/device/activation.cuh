// The activations of megakern/ops/activation.py and their derivatives, in fp32. NaN stays NaN.
//
// `exact` is for fp32 results. Without it, for results that are rounded to 16 bits, exp and 1/x are the hardware's
// approximations (2 ulp of fp32 each) and the normal distribution is Hastings' formula, right to 1e-7: about 15
// instructions for a gelu where erff takes 40, which would be slower than memory on an H200.
#pragma once

#include "device/platform.cuh"

namespace megakern {

template <bool exact>
MK_DEVICE float sigmoid(float x) {
  if constexpr (exact) return 1.0f / (1.0f + expf(-x));
  else return rcp_approx(1.0f + exp_approx(-x));
}

struct Normal {
  float below, density;  // Phi(x), phi(x)
};

// Abramowitz and Stegun 26.2.17: 1 - Phi(x) = phi(x) (b1 t + ... + b5 t^5) for x >= 0, t = 1 / (1 + 0.2316419 x).
template <bool exact>
MK_DEVICE Normal normal(float x) {
  if constexpr (exact) {
    return {0.5f * (1.0f + erff(x * 0.7071067811865476f)), 0.3989422804014327f * expf(-0.5f * x * x)};
  } else {
    const float density = 0.3989422804014327f * exp2_approx(x * x * -0.7213475204444817f);
    const float t = rcp_approx(1.0f + 0.2316419f * fabsf(x));
    const float sum = t * (0.31938153f + t * (-0.356563782f + t * (1.781477937f + t * (-1.821255978f + t * 1.330274429f))));
    const float tail = density * sum;
    return {x < 0.0f ? tail : 1.0f - tail, density};
  }
}

// (1 + tanh(u)) / 2 = sigmoid(2 u), without the cancellation; u = sqrt(2 / pi) (x + 0.044715 x^3).
template <bool exact>
MK_DEVICE float tanh_share(float x) {
  return sigmoid<exact>(1.5957691216057308f * x * (1.0f + 0.044715f * x * x));
}

template <Activation kind, bool exact = false>
MK_DEVICE float activate(float x) {
  if constexpr (kind == Activation::gelu) return x * normal<exact>(x).below;
  else if constexpr (kind == Activation::gelu_tanh) return x * tanh_share<exact>(x);
  else if constexpr (kind == Activation::relu_squared) return x < 0.0f ? 0.0f : x * x;
  else return x * sigmoid<exact>(x);
}

template <Activation kind, bool exact = false>
MK_DEVICE float slope(float x) {
  if constexpr (kind == Activation::gelu) {
    const Normal n = normal<exact>(x);
    return n.below + x * n.density;
  } else if constexpr (kind == Activation::gelu_tanh) {
    const float share = tanh_share<exact>(x);
    return share + x * share * (1.0f - share) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
  } else if constexpr (kind == Activation::relu_squared) {
    return x < 0.0f ? 0.0f : 2.0f * x;
  } else {
    const float share = sigmoid<exact>(x);
    return share * (1.0f + x * (1.0f - share));
  }
}

// f(std::integral_constant<Activation, kind>()): one branch for many values, instead of a kernel for each kind.
template <class F>
MK_DEVICE void with_activation(Activation kind, F f) {
  switch (kind) {
    case Activation::gelu: return f(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh: return f(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::relu_squared: return f(std::integral_constant<Activation, Activation::relu_squared>());
    case Activation::silu: return f(std::integral_constant<Activation, Activation::silu>());
  }
}

template <int N>
MK_DEVICE void activate_all(float (&v)[N], Activation kind) {
  with_activation(kind, [&](auto k) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = activate<decltype(k)::value>(v[i]);
  });
}

}  // namespace megakern
