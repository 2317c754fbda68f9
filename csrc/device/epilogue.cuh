// What follows the sums of a matrix product (product.cuh) on their way from registers to global memory.
#pragma once

#include "device/activation.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"

namespace megakern {

// What an epilogue gets besides tensor maps. Strides in elements.
struct Follows {
  const void *bias, *residual;  // null: absent; residual is T
  std::int64_t residual_stride;
  int M, N;         // of out
  int activation;   // Activation, or -1
  bool bias_is_fp32;
  bool keep;        // write the pre-activation too
  bool accumulate;  // into fp32 out
};

// What a warp does with its 16 rows of a fragment, chunk by chunk: the epilogue in registers, to shared memory, from there
// to global memory by TMA. No warp waits for another.
template <class T, class Out, class Tile>
struct Epilogue {
  static constexpr int width = 128 / int(sizeof(Out));  // columns of a chunk
  static constexpr int count = Tile::cols / width;      // chunks of a fragment
  static constexpr bool ahead = sizeof(Out) == 2 && Tile::fragments == 1;

  const Follows& p;
  const TensorMap *out_map, *pre_map;
  unsigned char* chunks;  // of this warp
  int warp, lane;         // of 4, of 32
  int turn = 0;
  std::uint32_t bias[Tile::cols / 64][2] = {};  // see load_bias
  std::uint32_t residual[16] = {};              // of the next chunk: one word for each pair of neighbours

  // A thread adds the bias of 16 columns in 64, but loads two, before the main loop; the other lanes have the rest.
  MK_DEVICE void load_bias(int col) {
    if (p.bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < Tile::cols / 64; ++i) {
      const int c = col + 64 * i + 2 * lane;
      bias[i][0] = bias[i][1] = 0;
      if (c < p.N) {
        const std::uint32_t* words = static_cast<const std::uint32_t*>(p.bias);
        if (p.bias_is_fp32) bias[i][0] = words[c], bias[i][1] = words[c + 1];
        else bias[i][0] = words[c / 2];
      }
    }
  }

  MK_DEVICE void add_bias(float (&v)[32], const std::uint32_t (&words)[2]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int source = 4 * j + lane % 4;
      float b0, b1;
      if (p.bias_is_fp32) b0 = as_float(shuffle(words[0], source)), b1 = as_float(shuffle(words[1], source));
      else unpacked<T>(shuffle(words[0], source), b0, b1);
      v[4 * j] += b0, v[4 * j + 1] += b1, v[4 * j + 2] += b0, v[4 * j + 3] += b1;
    }
  }

  // Started one chunk ahead where there are registers for that: the words come from device memory.
  MK_DEVICE void load_residual(int row, int col) {
    if (p.residual == nullptr) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * warp + lane / 4 + 8 * h, c = col + lane % 4 * 2;
      const T* from = static_cast<const T*>(p.residual) + r * p.residual_stride + c;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        residual[2 * j + h] = 0;
        if (r < p.M && c + 8 * j < p.N) residual[2 * j + h] = *reinterpret_cast<const std::uint32_t*>(from + 8 * j);
      }
    }
  }

  MK_DEVICE unsigned char* begin() {
    if (lane == 0) tma_wait_read<Tile::chunks - 1>();  // the store that last used this chunk has read it
    sync_warp();
    return chunks + turn * Tile::chunk_bytes;
  }

  MK_DEVICE void finish(const TensorMap* map, unsigned char* chunk, int row, int col) {
    fence_async();
    sync_warp();
    row += 16 * warp;
    if (lane == 0 && row < p.M && col < p.N) {
      if (sizeof(Out) == 4 && p.accumulate) tma_add_2d(map, chunk, col, row);
      else tma_store_2d(map, chunk, col, row);
    }
    if (lane == 0) tma_commit();
    turn = (turn + 1) % Tile::chunks;
  }

  // 64 columns as 16-bit values.
  MK_DEVICE void write(const TensorMap* map, const float (&v)[32], int row, int col) {
    unsigned char* chunk = begin();
    write_fragment<T>(chunk, v, lane);
    finish(map, chunk, row, col);
  }

  MK_DEVICE void chunk_of_16_bits(float (&v)[32], const std::uint32_t (&added)[16], int row, int col) {
    if (p.keep) {  // backward must see the value that the activation saw
#pragma unroll
      for (int i = 0; i < 32; ++i) v[i] = to_float(from_float<T>(v[i]));
      write(pre_map, v, row, col);
    }
    if (p.activation >= 0) activate_all(v, Activation(p.activation));
    if (p.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float a, b;
        unpacked<T>(added[i], a, b);
        v[2 * i] += a, v[2 * i + 1] += b;
      }
    }
    write(out_map, v, row, col);
  }

  MK_DEVICE void chunk_of_32_bits(const float (&v)[16], int row, int col) {
    unsigned char* chunk = begin();
    const int r = lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // 8 columns: two pieces of 16 bytes
      const int piece = 2 * j + lane % 4 / 2, within = lane % 2 * 8;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* to = reinterpret_cast<float*>(chunk + (r + 8 * h) * 128 + (piece ^ r) * 16 + within);
        to[0] = v[4 * j + 2 * h], to[1] = v[4 * j + 2 * h + 1];
      }
    }
    finish(out_map, chunk, row, col);
  }

  // The 64 rows from `row` on; the residual of the first chunk has been loaded.
  MK_DEVICE void fragment(const float (&d)[Tile::cols / 2], int row, int col) {
#pragma unroll
    for (int c = 0; c < count; ++c) {
      float v[width / 2];
#pragma unroll
      for (int i = 0; i < width / 2; ++i) v[i] = d[c * width / 2 + i];
      if constexpr (sizeof(Out) == 2) {
        std::uint32_t added[16];
        if (!ahead) load_residual(row, col + c * width);
#pragma unroll
        for (int i = 0; i < 16; ++i) added[i] = residual[i];
        if (ahead && c + 1 < count) load_residual(row, col + (c + 1) * width);
        if (p.bias != nullptr) add_bias(v, bias[c]);
        chunk_of_16_bits(v, added, row, col + c * width);
      } else {
        chunk_of_32_bits(v, row, col + c * width);
      }
    }
  }
};

}  // namespace megakern
