// Sums and maxima over a warp and over a block. The order is fixed by the lanes and warps, so the result is the same bits
// at each run, and the same in every thread. All threads of the warp or block must take part.
#pragma once

#include "device/shared.cuh"

namespace megakern {

struct Sum {
  template <class T>
  MK_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  MK_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }  // as fmaxf: NaN loses against a number
  MK_DEVICE int operator()(int a, int b) const { return a > b ? a : b; }
};

template <class T>
MK_DEVICE T warp_sum(T value) {
  return warp_reduce(value, Sum{});
}

template <class T>
MK_DEVICE T warp_max(T value) {
  return warp_reduce(value, Max{});
}

// Shared memory of the block reductions of one kernel: two rows that take turns, so that each reduction needs one
// barrier. A warp comes back to a row only after a barrier that all warps reach after they have read it.
template <class T = float>
class BlockScratch {
 public:
  static constexpr std::size_t bytes = 2 * shared_bytes<T>(32);

  MK_DEVICE explicit BlockScratch(SharedMemory& shared) : row_(shared.take<T>(32)), other_(shared.take<T>(32)) {}

  MK_DEVICE T* turn() {
    T* row = row_;
    row_ = other_;
    other_ = row;
    return row;
  }

 private:
  T *row_, *other_;
};

// `combine` is commutative; `neutral` changes nothing. Blocks of up to 1024 threads along x, a multiple of 32. T may be
// a struct of up to 16 bytes, such as a pair of sums.
template <class T, class Combine>
MK_DEVICE T block_reduce(T value, Combine combine, T neutral, BlockScratch<T>& scratch) {
  const int warps = int(blockDim.x) / kWarp, warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  value = warp_reduce(value, combine);
  if (warps == 1) return value;
  T* row = scratch.turn();
  if (lane == 0) row[warp] = value;
  sync_block();
  return warp_reduce(lane < warps ? row[lane] : neutral, combine);
}

MK_DEVICE float block_sum(float value, BlockScratch<float>& scratch) {
  return block_reduce(value, Sum{}, 0.0f, scratch);
}

MK_DEVICE float block_max(float value, BlockScratch<float>& scratch) {
  return block_reduce(value, Max{}, -INFINITY, scratch);
}

}  // namespace megakern
