// Kernels with a bug that a flag plants. The emulator must catch each: by an error, or by a wrong (NaN) result.
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "simt/tests/cases.h"

namespace megakern {
namespace {

enum Bug : int { kNone = 0, kFirst = 1, kSecond = 2, kThird = 3, kFourth = 4, kFifth = 5 };

// y[i] = x[threads - 1 - i], through shared memory.
// 1: half of a warp skips the barrier's branch. 2: the last warp leaves before it. 3: no barrier. 4, 5: an instruction for
// global memory writes, reads shared memory.
MK_KERNEL void reverse_kernel(const float* x, float* y, int bug) {
  SharedMemory shared;
  const int threads = int(blockDim.x), i = int(threadIdx.x);
  float* row = shared.take<float>(threads);
  if (bug == kFourth) store(row + i, load<1>(x + i));
  else row[i] = x[i];
  if (bug == kSecond && i >= threads - kWarp) return;
  if (bug == kFirst && i % kWarp < 16) {
    sync_block();
  } else if (bug != kThird) {
    sync_block();
  }
  y[i] = bug == kFifth ? load_once<1>(row + threads - 1 - i)[0] : row[threads - 1 - i];
}

// y[i] = the sum of x over the block. 1: the last value is never written. 2: it is written outside of what was launched.
// 3: reads far behind the end.
MK_KERNEL void uninitialised_kernel(const float* x, float* y, int bug) {
  SharedMemory shared;
  const int threads = int(blockDim.x), i = int(threadIdx.x);
  float* row = shared.take<float>(threads);
  if (bug != kFirst || i != threads - 1) row[i + (bug == kSecond && i == threads - 1)] = x[i];
  sync_block();
  float sum = 0.0f;
  for (int k = 0; k < threads; ++k) sum += row[bug == kThird ? k * 64 : k];
  y[i] = sum;
}

// Block b adds to what block b - 1 (bug: b + 1, or nobody) has left, and waits for it. out (blocks,), flag (blocks + 1,).
MK_KERNEL void chain_kernel(int* out, int* flag, int bug) {
  const int b = int(blockIdx.x), before = bug == kFirst ? b : b - 1;
  if (threadIdx.x == 0) {
    if (b > 0) {
      while (atomic_add(flag + before, 0) == 0) yield_thread();
    }
    out[b] = b > 0 ? out[b - 1] + b : 0;
    fence_device();
    atomic_add(flag + b, 1);
  }
  sync_block();
}

// Lane l gets the value of lane (l + 1) % 32. 1: a lane leaves before. 2: the halves of the warp shuffle in two places.
MK_KERNEL void rotate_kernel(const float* x, float* y, int bug) {
  const int i = int(threadIdx.x);
  if (bug == kFirst && i == 7) return;
  float v;
  if (bug == kSecond && i < 16) {
    v = shuffle(x[i], i + 1);
  } else {
    v = shuffle(x[i], i + 1);
  }
  y[i] = v;
}

}  // namespace

MK_CASE(reverse) {  // x, y; threads, bug
  MK_LAUNCH(reverse_kernel, 1, unsigned(a.number(0)), shared_bytes<float>(a.number(0)), a.place, a.tensor<float>(0),
            a.tensor<float>(1), a.number(1));
}

MK_CASE(uninitialised) {  // x, y; threads, bug
  MK_LAUNCH(uninitialised_kernel, 1, unsigned(a.number(0)), shared_bytes<float>(a.number(0)), a.place,
            a.tensor<float>(0), a.tensor<float>(1), a.number(1));
}

MK_CASE(chain) {  // out, flag; blocks, bug
  MK_LAUNCH(chain_kernel, unsigned(a.number(0)), 64, 0, a.place, a.tensor<int>(0), a.tensor<int>(1), a.number(1));
}

MK_CASE(rotate) {  // x, y; bug
  MK_LAUNCH(rotate_kernel, 1, 32, 0, a.place, a.tensor<float>(0), a.tensor<float>(1), a.number(0));
}

MK_CASE(bad_launch) {  // x, y; threads, shared bytes, device
  MK_LAUNCH(reverse_kernel, 1, unsigned(a.number(0)), std::size_t(a.number(1)), {a.number(2), nullptr},
            a.tensor<float>(0), a.tensor<float>(1), 0);
}

}  // namespace megakern
