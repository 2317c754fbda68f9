// AVX-512 building blocks: 16 fp32 lanes, loads and stores of fp32 and bf16, exp.
//
// Include it last: from here to the end of the file all code is compiled for AVX-512 (F, BW, DQ, VL), so no function of
// such a file may run before require_feature() let it. Arithmetic is fp32; bf16 is rounded to nearest even on the way out.
#pragma once

#include <immintrin.h>

#include <cstdint>

// With MEGAKERN_AVX512_BF16 defined before, for AVX512-BF16 too.
#if defined(MEGAKERN_AVX512_BF16)
#define MEGAKERN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16"
#else
#define MEGAKERN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma"
#endif
#define MEGAKERN_PRAGMA(text) _Pragma(#text)
#define MEGAKERN_PRAGMA_OF(...) MEGAKERN_PRAGMA(__VA_ARGS__)
#if defined(__clang__)
MEGAKERN_PRAGMA_OF(clang attribute push(__attribute__((target(MEGAKERN_TARGET))), apply_to = function))
#else
MEGAKERN_PRAGMA_OF(GCC target(MEGAKERN_TARGET))
#endif

#define MEGAKERN_INLINE inline __attribute__((always_inline))

namespace megakern {

struct bf16 {
  std::uint16_t bits;
};

namespace {

using Vec = __m512;
using Mask = __mmask16;

constexpr int kLanes = 16;

using Unit = std::uint32_t;  // 1 fp32 or 2 bf16: neighbours along the summed dimension of a matrix product

MEGAKERN_INLINE Mask first_lanes(std::int64_t count) {
  return count >= kLanes ? Mask(0xFFFF) : Mask((1u << count) - 1);
}

MEGAKERN_INLINE Vec widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// The upper halves of the lanes hold the rounded values. NaN stays NaN, and becomes quiet.
MEGAKERN_INLINE __m512i rounded_bits(Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
}

#if defined(MEGAKERN_AVX512_BF16)  // takes subnormals for zero
MEGAKERN_INLINE __m256i narrow(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
MEGAKERN_INLINE __m256i narrow(Vec x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(x), 16)); }
#endif

MEGAKERN_INLINE Vec load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
MEGAKERN_INLINE Vec load(const bf16* p, Mask m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
MEGAKERN_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
MEGAKERN_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

MEGAKERN_INLINE void store(float* p, Vec x, Mask m) { _mm512_mask_storeu_ps(p, m, x); }
MEGAKERN_INLINE void store(bf16* p, Vec x, Mask m) { _mm256_mask_storeu_epi16(p, m, narrow(x)); }
MEGAKERN_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
MEGAKERN_INLINE void store(bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }

MEGAKERN_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
MEGAKERN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// What the functions below must reach: rounding errors of fp32, or 1e-4, well below those of bf16.
enum Accuracy { kExact, kFast };
template <typename T>
constexpr Accuracy kAccuracyOf = sizeof(T) == sizeof(float) ? kExact : kFast;

// 2^x; 0 for x < -125.5, also for -inf; NaN for NaN. The polynomials are least in relative error on [-1/2, 1/2]:
// degree 6 2e-9, degree 4 3e-6. No lane makes a subnormal, for which Intel's processors leave the fast path: causal
// attention's masked scores took 45 % of its forward and 23 % of its backward pass.
template <Accuracy accuracy>
MEGAKERN_INLINE Vec exp2(Vec x) {
  const Mask normal = _mm512_cmp_ps_mask(x, set1(-125.5f), _CMP_NLT_UQ);
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = _mm512_sub_ps(x, n);
  Vec p;
  if constexpr (accuracy == kExact) {
    p = fma(set1(1.535336178e-04f), f, set1(1.339887446e-03f));
    p = fma(p, f, set1(9.618437358e-03f));
    p = fma(p, f, set1(5.550332471e-02f));
    p = fma(p, f, set1(2.402264791e-01f));
    p = fma(p, f, set1(6.931472029e-01f));
  } else {
    p = fma(set1(9.582852812e-03f), f, set1(5.590642500e-02f));
    p = fma(p, f, set1(2.402409862e-01f));
    p = fma(p, f, set1(6.931241933e-01f));
  }
  p = fma(p, f, set1(1.0f));
  return _mm512_maskz_scalef_ps(normal, p, n);
}

// e^x for x below 88, 0 for -inf, NaN for NaN and above 88 maybe inf.
template <Accuracy accuracy>
MEGAKERN_INLINE Vec exp(Vec x) {
  const Vec high = _mm512_mul_ps(x, set1(1.44269502f));  // log2(e)
  const Vec y = exp2<accuracy>(high);
  if constexpr (accuracy == kFast) return y;
  // What the product lost, so that the error does not grow with x.
  const Vec low = fma(x, set1(1.92596299e-8f), _mm512_fmsub_ps(x, set1(1.44269502f), high));
  const Mask small = _mm512_cmp_ps_mask(_mm512_abs_ps(x), set1(88.0f), _CMP_LT_OQ);  // no inf - inf
  return _mm512_mask3_fmadd_ps(y, _mm512_mul_ps(low, set1(6.93147181e-1f)), y, small);
}

template <Accuracy accuracy>
MEGAKERN_INLINE Vec reciprocal(Vec x) {
  if constexpr (accuracy == kFast) return _mm512_rcp14_ps(x);
  return _mm512_div_ps(set1(1.0f), x);
}

// rows[i][j] becomes rows[j][i].
MEGAKERN_INLINE void transpose_16(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16], eights[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
    }
  // fours[4 g + c] has, in its 128-bit lane l, column 4 l + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    eights[c] = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    eights[4 + c] = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xDD);
    eights[8 + c] = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    eights[12 + c] = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xDD);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm512_shuffle_i32x4(eights[c], eights[8 + c], 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(eights[c], eights[8 + c], 0xDD);
    rows[4 + c] = _mm512_shuffle_i32x4(eights[4 + c], eights[12 + c], 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(eights[4 + c], eights[12 + c], 0xDD);
  }
}

// to (columns, rows), rows `to_step` apart, = the transpose of x (rows, columns), rows `step` apart; rows: a multiple of
// 16.
inline void transpose(const Unit* x, int64_t step, int64_t rows, int64_t columns, Unit* to, int64_t to_step) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16) {
      __m512i lines[16];
      for (int64_t i = 0; i < 16; ++i)
        lines[i] = _mm512_maskz_loadu_epi32(first_lanes(columns - c), x + (r + i) * step + c);
      transpose_16(lines);
      for (int64_t i = 0; i < 16; ++i)
        if (c + i < columns) _mm512_storeu_si512(to + (c + i) * to_step + r, lines[i]);
    }
}

}  // namespace
}  // namespace megakern
