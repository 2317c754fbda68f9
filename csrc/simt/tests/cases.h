// Test kernels, called by name from Python through one C function: the library is built by g++ (emulator) or nvcc (GPU).
#pragma once

#include <cstdint>

#include "device/platform.cuh"

namespace megakern::tests {

// What a case gets from Python: addresses of tensors and whole numbers, in the order of its comment.
struct Arguments {
  void* const* pointers;
  const std::int64_t* numbers;
  Place place;

  template <class T>
  T* tensor(int i) const {
    return static_cast<T*>(pointers[i]);
  }
  int number(int i) const { return int(numbers[i]); }
};

struct Case {
  Case(const char* name, void (*run)(const Arguments&));
};

}  // namespace megakern::tests

// MK_CASE(name) { ... uses `a` ... }
#define MK_CASE(name)                                                              \
  static void name##_case(const ::megakern::tests::Arguments& a);                  \
  static const ::megakern::tests::Case name##_registered(#name, &name##_case);     \
  static void name##_case(const ::megakern::tests::Arguments& a)
