// Elementwise kernels over matrices (M, C): each input is read once, each output written whole, with 16 bytes a thread
// and access where every address and stride allows, else one element at a time. Values are fp32 in between.
//
// A block of 256 threads is x threads across and y rows high, as many rows as a narrow matrix needs to keep all busy;
// each thread takes kPieces pieces, a block's width apart, so that its loads are in flight together.
#pragma once

#include "device/checks.h"
#include "device/platform.cuh"
#include "device/vector.cuh"

namespace megakern {

constexpr int kElementwiseThreads = 256;
constexpr int kPieces = 2;  // two loads in flight for each tensor; not yet measured

struct ElementwiseGrid {
  dim3 grid, block;
};

// For `n` elements a piece.
inline ElementwiseGrid elementwise_grid(const Checks& check, int64_t M, int64_t C, int n) {
  int across = kElementwiseThreads;
  while (across > 1 && int64_t(across / 2) * n * kPieces >= C) across /= 2;
  const int rows = kElementwiseThreads / across;
  const int64_t blocks = ceil_div(M, int64_t(rows)) * ceil_div(C, int64_t(across) * n * kPieces);
  return {dim3(check.blocks(blocks)), dim3(across, rows)};
}

template <int INPUTS, int OUTPUTS>
struct Elementwise {
  const void* in[INPUTS];
  int64_t stride[INPUTS];
  void* out[OUTPUTS];  // contiguous
  int64_t M, C;
};

// body(in, out): float in[INPUTS] of one element to float out[OUTPUTS].
template <class T, int N, int INPUTS, int OUTPUTS, class Body>
MK_DEVICE void elementwise(const Elementwise<INPUTS, OUTPUTS>& p, Body body) {
  const unsigned width = blockDim.x * N * kPieces;
  const unsigned across = unsigned(ceil_div(p.C, int64_t(width)));
  const int64_t row = int64_t(blockIdx.x / across) * blockDim.y + threadIdx.y;
  const int64_t first = int64_t(blockIdx.x % across) * width + threadIdx.x * N;
  if (row >= p.M) return;
  const T* in[INPUTS];
  T* out[OUTPUTS];
#pragma unroll
  for (int i = 0; i < INPUTS; ++i) in[i] = static_cast<const T*>(p.in[i]) + row * p.stride[i];
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) out[i] = static_cast<T*>(p.out[i]) + row * p.C;

  const int64_t step = int64_t(blockDim.x) * N;
  if (first + (kPieces - 1) * step + N <= p.C) {
    Vector<T, N> read[kPieces][INPUTS];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < INPUTS; ++i) read[piece][i] = load_once<N>(in[i] + first + piece * step);
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Vector<float, N> result[OUTPUTS];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        float from[INPUTS], to[OUTPUTS];
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) from[i] = to_float(read[piece][i][e]);
        body(from, to);
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) result[i][e] = to[i];
      }
#pragma unroll
      for (int i = 0; i < OUTPUTS; ++i) store(out[i] + first + piece * step, from_float<T>(result[i]));
    }
    return;
  }
  for (int piece = 0; piece < kPieces; ++piece) {  // the end of a row
    for (int64_t col = first + piece * step; col < p.C && col < first + piece * step + N; ++col) {
      float from[INPUTS], to[OUTPUTS];
#pragma unroll
      for (int i = 0; i < INPUTS; ++i) from[i] = to_float(in[i][col]);
      body(from, to);
#pragma unroll
      for (int i = 0; i < OUTPUTS; ++i) out[i][col] = from_float<T>(to[i]);
    }
  }
}

// Whether all tensors may be read and written in pieces of 16 bytes.
template <int INPUTS, int OUTPUTS>
bool vectors_fit(const Elementwise<INPUTS, OUTPUTS>& p, Dtype dtype) {
  const int64_t bytes = size_of(dtype);
  bool fit = true;
  for (int i = 0; i < INPUTS; ++i) fit = fit && vectors_fit(p.in[i], p.M > 1 ? p.stride[i] * bytes : 0);
  for (int i = 0; i < OUTPUTS; ++i) fit = fit && vectors_fit(p.out[i], p.M > 1 ? p.C * bytes : 0);
  return fit;
}

}  // namespace megakern
