// Argument checks of the kernels: what was wanted, what came.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "api.h"

namespace megakern {

inline void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

inline int element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline void require_dtype(const char* op, int dtype) {
  require(dtype == kFloat32 || dtype == kBFloat16,
          std::string(op) + ": dtype code must be 0 (fp32) or 1 (bf16), got " + std::to_string(dtype));
}

// Not null, and aligned to its elements.
inline void require_address(const char* op, const char* name, Address address, int size) {
  require(address != 0, std::string(op) + ": the address of " + name + " is null");
  require(address % size == 0, std::string(op) + ": the address of " + name + " must be a multiple of " +
                                   std::to_string(size) + ", got " + std::to_string(address));
}

inline void require_positive(const char* op, const char* name, int64_t value) {
  require(value > 0, std::string(op) + ": " + name + " must be positive, got " + std::to_string(value));
}

// Sizes whose product, in bytes, is a valid offset.
inline void require_addressable(const char* op, int64_t a, int64_t b) {
  require(a <= (int64_t(1) << 60) / b, std::string(op) + ": " + std::to_string(a) + " x " + std::to_string(b) +
                                           " elements are more than an address can reach");
}

// Two contiguous tensors of `bytes` are one and the same, or do not meet.
inline void require_no_partial_overlap(const char* op, const char* name_a, Address a, const char* name_b, Address b,
                                       int64_t bytes) {
  const bool apart = a + Address(bytes) <= b || b + Address(bytes) <= a;
  require(a == b || apart, std::string(op) + ": " + name_a + " and " + name_b + " overlap in part");
}

}  // namespace megakern
