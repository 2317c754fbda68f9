// What the three kernels of attention_backward.cu share: tiles, the plan, where a tile of queries lies in scratch memory;
// and the two small kernels before and behind the large one.
#pragma once

#include "device/attention.cuh"
#include "device/fragment.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"

namespace megakern {

// Sizes of the kernels for head dims up to D and tiles of Rows queries. Each of two consumers sums dk and dv of 64 keys:
// with D up to 128 its own 64 keys, else one half of the columns of the same 64, so that both compute all scores (1.4
// times the products).
template <int D, int Rows>
struct BackwardTile {
  static constexpr bool split = D > 128;  // by columns
  static constexpr int rows = Rows, keys = split ? 64 : 128;
  static constexpr int span = rows % 64 == 0 ? 64 : rows;  // queries of one product
  // dq is computed as (columns, queries): rows of a product come in 64s, columns in 8s. For plain scores alone.
  static constexpr bool turned = span != 64;
  static constexpr int stages = 2, dout_stages = split ? 1 : 2;
  static constexpr int slabs = D / 64, own_slabs = split ? 2 : slabs;  // of 64 columns: 128 bytes, the width of a swizzle
  static constexpr int q_slab = rows * 128, kv_slab = keys * 128;
  static constexpr int q_bytes = slabs * q_slab, kv_bytes = slabs * kv_slab;
  // 64 queries of all keys, a row a key; split: a copy for each consumer; turned: all queries of 64 keys, a row a query.
  static constexpr int ds_slab = (turned ? rows : keys) * 128;
  static constexpr int ds_bytes = (split || turned ? 2 : rows / 64) * ds_slab;
  static constexpr int part = 64 * span, pieces = split ? 2 : 1;  // of dq: what a consumer makes at a time, of a tile
  static constexpr int line = 2 * pieces * part;                // of sums of dq: a tile
  // Where things lie behind one aligned address: the producer has 24 registers a thread, too few for an address each.
  static constexpr int k = 0, v = k + kv_bytes, q = v + kv_bytes, dout = q + stages * q_bytes;
  static constexpr int ds = dout + dout_stages * q_bytes, dq = ds + 2 * ds_bytes, row_keys = dq + 2 * part * 4;
  static constexpr int lse = row_keys + (turned ? 0 : dout_stages * rows * 8), delta = lse + stages * rows * 4;
  static constexpr int barriers = delta + dout_stages * rows * 4;
  static constexpr int bytes = barriers + 8 * (1 + 2 * stages + 2 * dout_stages);
  static constexpr int shared = 1024 + round_up(bytes, 16);
  static_assert(line == rows * D);
  static_assert(shared <= 227 * 1024, "shared memory of a block on sm_90");

  // The first column and row of part number i of a line.
  static constexpr MK_BOTH int column(int i) { return D == 64 ? 0 : 64 * i; }
  static constexpr MK_BOTH int row(int i) { return D == 64 ? 64 * i : 0; }
};

// What the kernels get besides tensor maps. A line: one tile of queries of one head, in scratch memory.
struct BackwardPlan {
  float* dq_sums;           // (lines, rows * D): parts of span / 8 x 128 x 4 values, as they lie in a consumer's registers
  float* statistics;        // (lines, 2, rows): lse log2(e), +inf where a query sees nothing; sum over D of dout out
  std::uint64_t* row_keys;  // (lines, rows), of dropout; null without
  int* turns;               // (lines,): tiles of keys that have been added, where the order is fixed; null: any order
  bool from_registers;      // without turns: consumers add to dq_sums themselves, not by way of shared memory
  const int *q_offsets, *k_offsets;  // of packed sequences; null: none
  int sequences;
  int T, S, H, group;
  int heads;             // of keys, of all samples
  int section;           // of them in flight at a time: what is read again fits the L2 cache
  int q_tiles, k_tiles;  // a head: of one sample, or of all packed sequences
  int left, right;
  float scale;
  AttentionScoring scoring;
};

// The tile of queries that line `line` is.
template <int Rows>
struct BackwardLine {
  int sample, head, start, length, row;  // row: the first of the tile in its sequence, perhaps past `length`

  MK_DEVICE BackwardLine(const BackwardPlan& p, int line) {
    const int tile = line % p.q_tiles;
    head = line / p.q_tiles % p.H, sample = line / p.q_tiles / p.H;
    start = 0, length = p.T, row = tile * Rows;
    if (p.q_offsets != nullptr) {
      const AttentionSequence s(p.q_offsets, p.k_offsets, p.sequences, tile, Rows);
      sample = s.sample, start = s.start, length = s.length, row = s.first;
    }
  }
};

// --- kernels ---

constexpr int kRowThreads = 256;

struct BackwardRows {
  const void *dout, *out;
  const float* lse;
  AttentionStrides dout_strides, out_strides;
  int D;
};

// A line's statistics, and zeros where the large kernel adds and counts.
template <class T, int D, int Rows>
MK_KERNEL void __launch_bounds__(kRowThreads)
    backward_rows_kernel(const MK_GRID_CONSTANT BackwardRows r, const MK_GRID_CONSTANT BackwardPlan plan) {
  using Tile = BackwardTile<D, Rows>;
  constexpr int across = D / 8, high = kRowThreads / across;  // 16 bytes a thread
  const int line = int(blockIdx.x), thread = int(threadIdx.x);
  const BackwardLine<Tile::rows> at(plan, line);
  if (at.row >= at.length) return;
  const bool packed = plan.q_offsets != nullptr;
  const std::int64_t place = packed ? 0 : at.sample, token = at.start + at.row;
  const auto first = [&](const void* x, const AttentionStrides& by) {
    return static_cast<const T*>(x) + place * by.sample + token * by.token + at.head * by.head;
  };
  const T *dout = first(r.dout, r.dout_strides), *out = first(r.out, r.out_strides);
  const float* lse = r.lse + (place * plan.H + at.head) * plan.T + token;
  float* statistics = plan.statistics + std::int64_t(line) * 2 * Tile::rows;
  const int col = thread % across * 8;
#pragma unroll
  for (int i = 0; i < Tile::rows; i += high) {
    const int row = i + thread / across;
    const bool inside = at.row + row < at.length;
    float sum = 0;
    if (inside && col < r.D) {
      const auto a = to_float(load<8>(dout + row * r.dout_strides.token + col));
      const auto b = to_float(load<8>(out + row * r.out_strides.token + col));
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += a[e] * b[e];
    }
#pragma unroll
    for (int mask = across / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (col == 0) {
      const float log = inside ? lse[row] : -INFINITY;
      statistics[row] = log == -INFINITY ? INFINITY : log * kLog2E;  // 2^(s - inf) = 0
      statistics[Tile::rows + row] = sum;
    }
  }
  if (plan.row_keys != nullptr && thread < Tile::rows) {
    const std::uint64_t key = plan.scoring.head_key(at.sample, at.head);
    plan.row_keys[std::int64_t(line) * Tile::rows + thread] = fold(key, at.row + thread);
  }
  if (plan.turns != nullptr && thread == 0) plan.turns[line] = 0;
  float* sums = plan.dq_sums + std::int64_t(line) * Tile::line;
#pragma unroll
  for (int i = 0; i < Tile::line; i += 4 * kRowThreads) store(sums + i + 4 * thread, filled<float, 4>(0.0f));
}

// dq of a line, from sums in fp32: 128 threads a part.
template <class T, int D, int Rows>
MK_KERNEL void __launch_bounds__(256 * BackwardTile<D, Rows>::pieces)
    backward_dq_kernel(const MK_GRID_CONSTANT TensorMap dq_map, const MK_GRID_CONSTANT BackwardPlan plan) {
#if MK_SM90A
  using Tile = BackwardTile<D, Rows>;
  SharedMemory shared;
  unsigned char* tiles = shared.take<unsigned char>(Tile::line * 2, 1024);
  const int line = int(blockIdx.x), part = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128;
  const BackwardLine<Tile::rows> at(plan, line);
  const int row = at.row + Tile::row(part), col = Tile::column(part);
  if (at.row >= at.length) return;
  const float* sums = plan.dq_sums + std::int64_t(line) * Tile::line + part * Tile::part + 4 * thread;
  float v[Tile::span / 2];
#pragma unroll
  for (int i = 0; i < Tile::span / 8; ++i) {
    const Vector<float, 4> four = load_once<4>(sums + 512 * i);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[4 * i + e] = four[e] * plan.scale;
  }
  unsigned char* tile = tiles + part * Tile::span * 128;
  if constexpr (Tile::turned) write_transposed<T>(tile, v, thread / 32, thread % 32);
  else write_fragment<T>(tile + thread / 32 * 16 * 128, v, thread % 32);
  fence_async();
  sync_block();
  if (thread < kWarp && row < at.length && elect_lane()) {
    const HeadBox box(plan.q_offsets != nullptr, at.sample, at.head, at.start, at.length, row, Tile::span);
    tma_store_4d(&dq_map, tile, col, box.y, box.z, box.w);
    tma_commit();
    tma_wait<0>();
  }
#endif
}

}  // namespace megakern
