// bf16 and fp16 on a CPU, in the layout of CUDA's types, rounded as CUDA rounds: to nearest even, any NaN to 0x7FFF.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace megakern {

struct bf16 {
  std::uint16_t bits;
};

struct fp16 {
  std::uint16_t bits;
};

namespace simt {

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline std::uint16_t bf16_bits(float x) {
  const std::uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return std::uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline std::uint16_t fp16_bits(float x) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return 0x7FFF;
  if (size >= 0x477FF000u) return std::uint16_t(sign | 0x7C00);  // from 65520 on: infinity
  if (size < 0x38800000u) {  // below 2^-14: units of 2^-24; adding 0.5 puts that unit into the last bit of the sum
    return std::uint16_t(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
  }
  return std::uint16_t(sign | ((size - 0x38000000u + 0xFFF + (size >> 13 & 1)) >> 13));
}

inline float fp16_value(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t(half & 0x8000) << 16, size = half & 0x7FFF;
  if (size >= 0x7C00) return float_of(sign | 0x7F800000u | (size & 0x3FF) << 13);
  if (size < 0x400) return float_of(sign | bits_of(float(size) * 0x1p-24f));
  return float_of(sign | ((size << 13) + 0x38000000u));
}

}  // namespace simt

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return simt::float_of(std::uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) { return simt::fp16_value(x.bits); }

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return bf16{simt::bf16_bits(x)};
  else if constexpr (std::is_same_v<T, fp16>) return fp16{simt::fp16_bits(x)};
  else return x;
}

template <class T>
void from_float_pair(float a, float b, T* out) {
  out[0] = from_float<T>(a);
  out[1] = from_float<T>(b);
}

}  // namespace megakern
