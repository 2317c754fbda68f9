// The activations of megakern/ops/activation.py and their derivatives, on 16 fp32 lanes.
#pragma once

#include "api.h"
#include "cubics.h"
#include "simd.h"

namespace megakern {
namespace {

// 1 / (1 + exp(-x)); NaN for NaN.
template <Accuracy accuracy>
MEGAKERN_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp<accuracy>(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return reciprocal<accuracy>(_mm512_add_ps(set1(1.0f), e));
}

struct Normal {
  Vec cdf;       // Phi(x)
  Vec exp_half;  // exp(-x^2 / 2)
};

// Phi(x) = erfc(-x / sqrt(2)) / 2 by Abramowitz and Stegun 7.1.26: absolute error of erfc 1.5e-7.
template <Accuracy accuracy>
MEGAKERN_INLINE Normal normal(Vec x) {
  const Vec z = _mm512_mul_ps(_mm512_abs_ps(x), set1(0.70710678f));
  const Vec t = reciprocal<accuracy>(fma(z, set1(0.3275911f), set1(1.0f)));
  const Vec e = exp<accuracy>(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z)));
  Vec p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const Vec tail = _mm512_mul_ps(_mm512_mul_ps(p, t), _mm512_mul_ps(e, set1(0.5f)));  // Phi(-|x|)
  const Mask negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return {_mm512_mask_blend_ps(negative, _mm512_sub_ps(set1(1.0f), tail), tail), e};
}

// gelu_tanh(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), as (1 + tanh(u)) / 2 = sigmoid(2 u).
constexpr float kTwoRootTwoOverPi = 1.59576912f;
constexpr float kCubic = 0.044715f;

template <int kind, Accuracy accuracy>
MEGAKERN_INLINE Vec activate(Vec x) {
  if constexpr (accuracy == kFast && (kind == kGelu || kind == kGeluTanh)) {
    return _mm512_mul_ps(x, from_cubics<kind, false>(x));
  } else if constexpr (kind == kGelu) {
    return _mm512_mul_ps(x, normal<accuracy>(x).cdf);
  } else if constexpr (kind == kGeluTanh) {
    const Vec x2 = _mm512_mul_ps(x, x);
    const Vec u = _mm512_mul_ps(_mm512_mul_ps(x, set1(kTwoRootTwoOverPi)), fma(x2, set1(kCubic), set1(1.0f)));
    return _mm512_mul_ps(x, sigmoid<accuracy>(u));
  } else if constexpr (kind == kReluSquared) {
    const Vec positive = _mm512_max_ps(_mm512_setzero_ps(), x);
    return _mm512_mul_ps(positive, positive);
  } else if constexpr (kind == kSilu) {
    return _mm512_mul_ps(x, sigmoid<accuracy>(x));
  } else {
    return x;
  }
}

template <int kind, Accuracy accuracy>
MEGAKERN_INLINE Vec derivative(Vec x) {
  if constexpr (accuracy == kFast && (kind == kGelu || kind == kGeluTanh)) {
    return from_cubics<kind, true>(x);
  } else if constexpr (kind == kGelu) {
    const Normal n = normal<accuracy>(x);  // Phi(x) + x phi(x)
    return fma(_mm512_mul_ps(x, n.exp_half), set1(0.39894228f), n.cdf);
  } else if constexpr (kind == kGeluTanh) {
    const Vec x2 = _mm512_mul_ps(x, x);
    const Vec u = _mm512_mul_ps(_mm512_mul_ps(x, set1(kTwoRootTwoOverPi)), fma(x2, set1(kCubic), set1(1.0f)));
    const Vec s = sigmoid<accuracy>(u);
    const Vec slope = fma(x2, set1(3.0f * kCubic * kTwoRootTwoOverPi), set1(kTwoRootTwoOverPi));
    const Vec s_slope = _mm512_mul_ps(_mm512_mul_ps(s, _mm512_sub_ps(set1(1.0f), s)), slope);
    return fma(x, s_slope, s);
  } else if constexpr (kind == kReluSquared) {
    const Vec positive = _mm512_max_ps(_mm512_setzero_ps(), x);
    return _mm512_add_ps(positive, positive);
  } else {
    static_assert(kind == kSilu);
    const Vec s = sigmoid<accuracy>(x);
    return fma(_mm512_mul_ps(x, s), _mm512_sub_ps(set1(1.0f), s), s);
  }
}

}  // namespace
}  // namespace megakern
