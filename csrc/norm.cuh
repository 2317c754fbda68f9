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
    return 2 * shared_bytes<Sums<N>>(std::size_t(rows) * ceil_div(threads, kWarp) * ranks);
  }

  MK_DEVICE explicit RowSums(SharedMemory& shared, int rank = 0, int ranks = 1)
      : rank_(rank), ranks_(ranks), warps_(ceil_div(int(blockDim.x), kWarp)) {
    const int count = blockDim.y * warps_ * ranks_;  // several rows or several ranks, never both
    mine_ = shared.take<Sums<N>>(count) + threadIdx.y * warps_;
    other_ = shared.take<Sums<N>>(count) + threadIdx.y * warps_;
    if (ranks_ > 1) cluster_arrive(), cluster_wait();  // a block must have started before others write into it
  }

  MK_DEVICE Sums<N> operator()(Sums<N> value) {
    const int threads = blockDim.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (threads < kWarp) {
      for (int mask = threads / 2; mask > 0; mask /= 2) value = Add{}(value, shuffle_xor(value, mask));
      return value;
    }
    value = warp_reduce(value, Add{});
    if (warps_ * ranks_ == 1) return value;
    if (ranks_ > 1) {
      if (lane < ranks_) *cluster_shared(&mine_[rank_ * warps_ + warp], lane) = value;
      cluster_arrive(), cluster_wait();
    } else {
      if (lane == 0) mine_[warp] = value;
      sync_block();
    }
    Sums<N> total = {};
    for (int i = lane; i < warps_ * ranks_; i += kWarp) total = Add{}(total, mine_[i]);
    Sums<N>* used = mine_;
    mine_ = other_;
    other_ = used;
    return warp_reduce(total, Add{});
  }

 private:
  int rank_, ranks_, warps_;
  Sums<N> *mine_, *other_;
};

// --- launchers of norm_chunks.cu, which those of norm.cu call after their checks ---

// `vectors`: all rows are on 16 bytes. The backward one leaves p.parts rows of sums, as norm_backward_kernel does.
void norm_forward_chunks(const NormForward&, bool vectors, Place);
void norm_backward_chunks(const NormBackward&, bool vectors, Place);

}  // namespace megakern
