// Fragments of matrices in the registers of a warp: 16 rows, a multiple of 8 columns, as wgmma and mma leave their sums.
// Lane l holds d[i] of row l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2.
#pragma once

#include "device/ptx.cuh"

namespace megakern {

template <class T>
MK_DEVICE std::uint32_t packed(float a, float b) {
  T pair[2];
  from_float_pair(a, b, pair);
  std::uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}

template <class T>
MK_DEVICE void unpacked(std::uint32_t word, float& a, float& b) {
  T pair[2];
  memcpy(pair, &word, sizeof word);
  a = to_float(pair[0]), b = to_float(pair[1]);
}

MK_DEVICE float as_float(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The sums as operand A of the next product: a[k] has columns 16 k to 16 k + 15.
template <class T, int N>
MK_DEVICE void pack_fragment(std::uint32_t (&a)[N / 8][4], const float (&d)[N]) {
#pragma unroll
  for (int k = 0; k < N / 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = packed<T>(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
  }
}

// Columns 16 j to 16 j + 15 of a fragment, already packed, to 16 rows of 128 bytes under Swizzle::b128. All lanes call;
// `rows` on a multiple of 1024.
MK_DEVICE void write_columns(unsigned char* rows, const std::uint32_t (&words)[4], int j, int lane) {
  const int r = lane % 16;
  stmatrix_x4(rows + r * 128 + ((2 * j + lane / 16) ^ (r % 8)) * 16, words);
}

// 64 columns, v[0] to v[31], rounded to T.
template <class T>
MK_DEVICE void write_fragment(unsigned char* rows, const float* v, int lane) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float* w = v + 8 * j;
    write_columns(rows, {packed<T>(w[0], w[1]), packed<T>(w[2], w[3]), packed<T>(w[4], w[5]), packed<T>(w[6], w[7])}, j,
                  lane);
  }
}

// Transposed: columns 16 j to 16 j + 15 of the fragment of warp `warp`, packed, to rows 16 j to 16 j + 15 of a tile of rows
// of 128 bytes under Swizzle::b128, there columns 16 warp to 16 warp + 15. All lanes call; `tile` on a multiple of 1024.
MK_DEVICE void write_rows(unsigned char* tile, const std::uint32_t (&words)[4], int j, int warp, int lane) {
  const int r = lane % 8, row = 16 * j + lane / 16 * 8 + r;
  stmatrix_x4_transposed(tile + row * 128 + ((2 * warp + lane / 8 % 2) ^ r) * 16, words);
}

// All columns of the fragment, rounded to T.
template <class T, int N>
MK_DEVICE void write_transposed(unsigned char* tile, const float (&v)[N], int warp, int lane) {
  std::uint32_t words[N / 8][4];
  pack_fragment<T>(words, v);
#pragma unroll
  for (int j = 0; j < N / 8; ++j) write_rows(tile, words[j], j, warp, lane);
}

}  // namespace megakern
