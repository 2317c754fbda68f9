// Dynamic shared memory, the only kind in this project: pieces taken one after another, by the same code in every thread.
//
// The launcher asks for the sum of the pieces, each rounded up to 16 bytes (shared_bytes<T>), plus `align` for each piece
// with an alignment above 16: the start of shared memory is aligned to 16 bytes and to nothing more.
#pragma once

#include "device/platform.cuh"

namespace megakern {

template <class T>
MK_BOTH constexpr std::size_t shared_bytes(std::size_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

class SharedMemory {
 public:
  MK_DEVICE SharedMemory() : next_(dynamic_shared_memory()) {}

  // `count` values, not initialised, on a multiple of `align` bytes (a power of two, at least 16).
  template <class T>
  MK_DEVICE T* take(int count, int align = 16) {
    const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(next_);
    unsigned char* piece = next_ + ((start + align - 1) / align * align - start);
    next_ = piece + shared_bytes<T>(count);
    check_shared_end(next_);
    return reinterpret_cast<T*>(piece);
  }

 private:
  unsigned char* next_;
};

}  // namespace megakern
