// Sums and maxima over the ranks' parts of a chunk, for any processor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define MEGAKERN_AVX2 __attribute__((target("avx2")))
#endif

namespace megakern {
namespace {

struct half_float {  // bf16; simd.h's is for AVX-512 alone
  uint16_t bits;
};

#define MEGAKERN_ALWAYS inline __attribute__((always_inline))

template <typename T>
struct Wide {
  using type = T;
};
template <>
struct Wide<half_float> {
  using type = float;
};

template <typename T>
MEGAKERN_ALWAYS T widen(T x) {
  return x;
}
MEGAKERN_ALWAYS float widen(half_float x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

template <typename T>
MEGAKERN_ALWAYS void narrow(T x, T* out) {
  *out = x;
}
MEGAKERN_ALWAYS void narrow(float x, half_float* out) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  out->bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
}

constexpr int64_t kBlock = 1024;  // elements added up in the first-level cache

// out = parts[0] + parts[1] + ... in this order; out may be one of them.
template <typename T, bool maximum>
MEGAKERN_ALWAYS void reduce_blocks(T* out, const T* const* parts, int ranks, int64_t elements) {
  using W = typename Wide<T>::type;
  W sum[kBlock];
  for (int64_t first = 0; first < elements; first += kBlock) {
    const int64_t count = std::min(kBlock, elements - first);
    const T* x = parts[0] + first;
    for (int64_t i = 0; i < count; ++i) sum[i] = widen(x[i]);
    for (int r = 1; r < ranks; ++r) {
      x = parts[r] + first;
      for (int64_t i = 0; i < count; ++i) {
        const W value = widen(x[i]);
        if constexpr (maximum)
          sum[i] = value != value || value > sum[i] ? value : sum[i];  // NaN wins
        else
          sum[i] += value;
      }
    }
    T* y = out + first;
    for (int64_t i = 0; i < count; ++i) narrow(sum[i], y + i);
  }
}

template <typename T, bool maximum>
void reduce_plain(T* out, const T* const* parts, int ranks, int64_t elements) {
  reduce_blocks<T, maximum>(out, parts, ranks, elements);
}

#if defined(MEGAKERN_AVX2)
template <typename T, bool maximum>
MEGAKERN_AVX2 void reduce_avx2(T* out, const T* const* parts, int ranks, int64_t elements) {
  reduce_blocks<T, maximum>(out, parts, ranks, elements);
}
#endif

template <typename T>
void reduce(void* out, const char* const* parts, int ranks, int64_t elements, bool maximum) {
  const T* const* typed = reinterpret_cast<const T* const*>(parts);
  const auto call = [&](auto* sum, auto* largest) {
    (maximum ? largest : sum)(static_cast<T*>(out), typed, ranks, elements);
  };
#if defined(MEGAKERN_AVX2)
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) return call(reduce_avx2<T, false>, reduce_avx2<T, true>);
#endif
  call(reduce_plain<T, false>, reduce_plain<T, true>);
}

}  // namespace
}  // namespace megakern
