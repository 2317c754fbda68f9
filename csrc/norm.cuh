// What norm.cu and norm_chunks.cu share: sums over the threads of a row.
#pragma once

#include "device/ptx.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"

namespace megakern {

// N sums at a time through shuffles and shared memory.
template <int N>
struct Sums {
  float value[N];
};

struct Add {
  MK_DEVICE float operator()(float a, float b) const { return a + b; }
  template <int N>
  MK_DEVICE Sums<N> operator()(Sums<N> a, const Sums<N>& b) const {
#pragma unroll
    for (int i = 0; i < N; ++i) a.value[i] += b.value[i];
    return a;
  }
};

template <int N>
MK_DEVICE float sum_of(const Vector<float, N>& v) {  // by halves: short chains of additions
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vector<float, N / 2> half;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) half[i] = v[i] + v[i + N / 2];
    return sum_of(half);
  }
}

// Sums over the threads of a row, which are neighbours along x in each block of a cluster; the same bits in all of them.
// Two buffers take turns: one barrier a sum is enough.
template <int N>
class RowSums {
 public:
  static std::size_t bytes(int threads, int rows, int ranks) {
    return shared_bytes<Sums<N>>(std::size_t(2) * rows * ceil_div(threads, kWarp) * ranks);
  }

  MK_DEVICE explicit RowSums(SharedMemory& shared, int rank = 0, int ranks = 1)
      : rank_(rank), ranks_(ranks), warps_(ceil_div(int(blockDim.x), kWarp)) {
    const int count = blockDim.y * warps_ * ranks_;  // several rows or several ranks, never both
    area_ = shared.take<Sums<N>>(2 * count) + threadIdx.y * warps_;
    turn_ = count;
    if (ranks_ > 1) cluster_arrive(), cluster_wait();  // a block must have started before others write into it
  }

  MK_DEVICE int warps() const { return warps_ * ranks_; }  // of a row

  // Over those of the row's threads that are in this warp.
  template <class S>
  MK_DEVICE static S of_warp(S value) {
    if (blockDim.x >= kWarp) return warp_reduce(value, Add{});
    for (int mask = blockDim.x / 2; mask > 0; mask /= 2) value = Add{}(value, shuffle_xor(value, mask));
    return value;
  }

  // Values of this warp, alike in its lanes -> those of all warps of the row. Where a row has more than one warp.
  MK_DEVICE const Sums<N>* gather(const Sums<N>& value) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    Sums<N>* all = area_;
    area_ += turn_;
    turn_ = -turn_;
    if (ranks_ > 1) {
      if (lane < ranks_) *cluster_shared(&all[rank_ * warps_ + warp], lane) = value;
      cluster_arrive(), cluster_wait();
    } else {
      if (lane == 0) all[warp] = value;
      sync_block();
    }
    return all;
  }

  MK_DEVICE Sums<N> operator()(Sums<N> value) {
    value = of_warp(value);
    if (warps() == 1) return value;
    const Sums<N>* all = gather(value);
    Sums<N> total = {};
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < warps(); i += kWarp) total = Add{}(total, all[i]);
    return warp_reduce(total, Add{});
  }

 private:
  int rank_, ranks_, warps_, turn_;
  Sums<N>* area_;
};

// --- launchers of norm_chunks.cu, which those of norm.cu call after their checks ---

// `vectors`: all rows are on 16 bytes. The backward one leaves p.parts rows of sums, as norm_backward_kernel does.
void norm_forward_chunks(const NormForward&, bool vectors, Place);
void norm_backward_chunks(const NormBackward&, bool vectors, Place);

}  // namespace megakern
