// Counter-based dropout with an optional residual; megakern/ops/dropout.py defines the mask, bit for bit.
//
// Writes: out whole (=), contiguous; it may be x or residual. A thread owns up to kPieces pieces of one row, 16 bytes of
// each tensor (one element where an address or a stride is no multiple of that), their loads in flight together, and makes
// the row's key once. fp32, bf16, fp16, computed in fp32 and rounded once. No shared memory.
#include <algorithm>

#include "device/checks.h"
#include "device/random.cuh"
#include "device/vector.cuh"

namespace megakern {
namespace {

constexpr int kThreads = 256;
constexpr int kPieces = 2;

// --- kernels ---

// Block (x, y): y rows, blockDim.x kPieces pieces of each; `across` such blocks side by side. seed_key: of p.seed.
template <class T, int N>
MK_KERNEL void __launch_bounds__(kThreads) dropout_kernel(Dropout p, uint64_t seed_key, unsigned across) {
  const int64_t row = int64_t(blockIdx.x / across) * blockDim.y + threadIdx.y;
  if (row >= p.M) return;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* residual = static_cast<const T*>(p.residual) + (p.residual ? row * p.residual_stride : 0);
  T* out = static_cast<T*>(p.out) + row * p.C;
  const int64_t first = (int64_t(blockIdx.x % across) * blockDim.x * kPieces + threadIdx.x) * N, step = blockDim.x * N;
  Vector<T, N> read[kPieces], added[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int64_t col = first + i * step;
    if (col < p.C) {
      read[i] = load_once<N>(x + col);
      if (residual) added[i] = load_once<N>(residual + col);
    }
  }
  const uint64_t key = fold(seed_key, p.offset + row / p.length * p.distance + row % p.length);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int64_t col = first + i * step;
    if (col >= p.C) break;
    Vector<float, N> value = to_float(read[i]);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      value[e] *= keep(key, uint32_t(col + e), p.threshold) ? p.scale : 0.0f;  // a product: a dropped NaN stays NaN
    }
    if (residual) {
      const Vector<float, N> more = to_float(added[i]);
#pragma unroll
      for (int e = 0; e < N; ++e) value[e] += more[e];
    }
    store(out + col, from_float<T>(value));
  }
}

}  // namespace

// --- launchers ---

void dropout(const Dropout& p, Place place) {
  Checks check("dropout");
  check.floating(p.dtype);
  check.size("M", p.M), check.size("C", p.C);
  check.size("distance", p.distance, 1), check.size("length", p.length, 1, p.distance);
  check.size("offset", p.offset), check.size("seed", p.seed, 0, INT64_MAX);
  check.reads("x", p.x, p.dtype, p.M, p.C, p.x_stride);
  if (p.residual) check.reads("residual", p.residual, p.dtype, p.M, p.C, p.residual_stride);
  check.writes("out", p.out, p.dtype, p.M, p.C, p.C, Alias::whole);
  if (p.M == 0 || p.C == 0) return;
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t bytes = sizeof(T);
    const bool fit = vectors_fit(p.x, p.x_stride * bytes) && vectors_fit(p.out, p.C * bytes) &&
                     (!p.residual || vectors_fit(p.residual, p.residual_stride * bytes));
    const int64_t pieces = p.C / (fit ? kVector<T> : 1);
    int x = kThreads;
    while (x > 1 && int64_t(x / 2) * kPieces >= pieces) x /= 2;
    const int64_t across = ceil_div(pieces, int64_t(x) * kPieces);
    const dim3 grid(check.blocks(ceil_div(p.M, int64_t(kThreads / x)) * across)), block(x, kThreads / x);
    const uint64_t key = mix(uint64_t(p.seed));
    if (fit) MK_LAUNCH((dropout_kernel<T, kVector<T>>), grid, block, 0, place, p, key, unsigned(across));
    else MK_LAUNCH((dropout_kernel<T, 1>), grid, block, 0, place, p, key, unsigned(across));
  });
}

}  // namespace megakern
