// Kernels in the style of the memory-bound ops, to prove that one source serves both compilers.
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "simt/tests/cases.h"

namespace megakern {
namespace {

// x, y (M, C) contiguous.
struct NormalizeRows {
  const void* x;
  void* y;
  int C;
  float eps;
};

// y = (x - mean) / sqrt(variance + eps) of each row, which one block keeps in registers and shared memory.
template <class T>
MK_KERNEL void __launch_bounds__(1024) normalize_kernel(NormalizeRows p) {
  constexpr int N = kVector<T>;
  SharedMemory shared;
  BlockScratch<float> scratch(shared);
  float* row = shared.take<float>(p.C);
  const T* x = static_cast<const T*>(p.x) + std::int64_t(blockIdx.x) * p.C;
  T* y = static_cast<T*>(p.y) + std::int64_t(blockIdx.x) * p.C;
  float sum = 0.0f;
  for (int c = int(threadIdx.x) * N; c < p.C; c += int(blockDim.x) * N) {
    const Vector<float, N> v = to_float(load_once<N>(x + c));
    store_shared(row + c, v);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += v[i];
  }
  const float mean = block_sum(sum, scratch) / float(p.C);
  float squares = 0.0f;
  for (int c = int(threadIdx.x); c < p.C; c += int(blockDim.x)) squares += (row[c] - mean) * (row[c] - mean);
  const float scale = rsqrt(block_sum(squares, scratch) / float(p.C) + p.eps);
  for (int c = int(threadIdx.x) * N; c < p.C; c += int(blockDim.x) * N) {
    Vector<float, N> v = load<N>(row + c);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = (v[i] - mean) * scale;
    store_once(y + c, from_float<T>(v));
  }
}

// y = T(x) by pairs, back = float(y).
template <class T>
MK_KERNEL void convert_kernel(const float* x, T* y, float* back, std::int64_t count) {
  const std::int64_t i = (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 2;
  if (i >= count) return;
  const Vector<T, 2> v = from_float<T>(load<2>(x + i));
  store(y + i, v);
  back[i] = to_float(v[0]);
  back[i + 1] = to_float(v[1]);
}

}  // namespace

// x fp32, y, back fp32, an even count each; count, dtype of y.
MK_CASE(convert) {
  with_dtype(Dtype(a.number(1)), [&](auto zero) {
    using T = decltype(zero);
    MK_LAUNCH(convert_kernel<T>, unsigned(ceil_div(a.number(0), 2048)), 1024, 0, a.place, a.tensor<float>(0),
              a.tensor<T>(1), a.tensor<float>(2), a.number(0));
  });
}

// x, y (M, C) contiguous, rows of a multiple of 16 bytes; M, C, dtype, threads.
MK_CASE(normalize_rows) {
  with_dtype(Dtype(a.number(2)), [&](auto zero) {
    using T = decltype(zero);
    const NormalizeRows p = {a.tensor<T>(0), a.tensor<T>(1), a.number(1), 1e-5f};
    const std::size_t shared = BlockScratch<float>::bytes + shared_bytes<float>(p.C);
    MK_LAUNCH(normalize_kernel<T>, dim3(unsigned(a.number(0))), dim3(unsigned(a.number(3))), shared, a.place, p);
  });
}

}  // namespace megakern
