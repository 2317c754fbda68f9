// The counter-based dropout mask: megakern/ops/dropout.py defines it, bit for bit.
#pragma once

#include "device/platform.cuh"

namespace megakern {

MK_BOTH std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// The key of a seed is mix(seed); of a row, the key of what it lies in with its index folded in.
MK_BOTH std::uint64_t fold(std::uint64_t key, std::int64_t index) {
  return mix(key + (std::uint64_t(index) + 1) * 0x9E3779B97F4A7C15u);
}

// Is the element in `column` of the row with this key kept? threshold: the smallest signed value that is.
MK_DEVICE bool keep(std::uint64_t key, std::uint32_t column, int threshold) {
  std::uint32_t x = column * 0x9E3779B9u + std::uint32_t(key);
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x ^= std::uint32_t(key >> 32);
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return std::int32_t(x) >= threshold;
}

}  // namespace megakern
