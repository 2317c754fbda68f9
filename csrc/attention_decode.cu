// Attention of few queries against many keys, which lie in one tensor or in pages named by a table (arXiv 2309.06180); the
// math is in megakern/ops/attention.py. The keys are split over blocks (flash decoding), a second kernel combines.
//
// Writes: out and lse whole (=). Same bits at each run.
// Parallel: a block owns 16 rows (all query heads of a key-value head, all queries) and a piece of the keys; each of its
// four warps walks every fourth tile of that piece with a ring of stages of its own, filled by cp.async, so that no warp
// waits for another before the end. What bounds it is the reading of keys and values: tiles of 4 to 8 KB of each, and 64 KB
// and more of a multiprocessor on their way. Products by mma: 16 rows, not the 64 of wgmma, of which most would be empty.
// Limits: sm_80 on; bf16 and fp16; D a multiple of 8 up to 256; rows on multiples of 16 bytes.
#include <cmath>

#include "device/attention.cuh"
#include "device/attention_checks.h"
#include "device/fragment.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"

namespace megakern {

constexpr int kDecodeRows = 16, kDecodeWarps = 4, kDecodeThreads = 32 * kDecodeWarps;

// Head dims up to D. One stage of a warp: K, then V, in rows of D values whose 16-byte pieces c lie at c ^ (row % 8).
template <int Depth>
struct DecodeTile {
  static constexpr int depth = Depth, keys = Depth <= 64 ? 32 : 16, stages = Depth <= 128 ? 3 : 2;
  static constexpr int pieces = Depth / 8;  // of 16 bytes, a row
  static constexpr int bytes = keys * Depth * 2;
  static constexpr int resident = Depth <= 128 ? 2 : 1;  // blocks of a multiprocessor
  static constexpr int q_bytes = kDecodeRows * Depth * 2, stage_bytes = kDecodeWarps * stages * 2 * bytes;
  static constexpr int shared = 128 + q_bytes + stage_bytes;
  static_assert(kDecodeWarps * kDecodeRows * (Depth + 2) * 4 <= stage_bytes, "the warps' results lie where the stages were");
};

// What the kernel gets.
struct DecodePlan {
  const void *q, *k, *v;
  const int *table, *lengths;  // or null: S keys in one tensor
  void* out;                   // of T, or of float where the keys are split: the pieces' own results
  float* lse;
  AttentionStrides q_by, k_by, v_by;  // of k, v with a table: from page to page
  std::int64_t table_stride, out_split, lse_split;
  int T, S, H, group, D;
  int left, right;
  int page_shift;  // keys of a page: a power of two
  int row_blocks, splits;
  bool plain;  // scores are products times a scale above 0
  AttentionScoring scoring;
};

// --- kernels ---

template <class T, class Tile>
struct DecodeWarp {
  const DecodePlan& p;
  unsigned char *q, *stages;  // q: of the block; rows as those of K
  const T *k, *v;    // of the head; with a table of page 0
  const int* table;  // of the sample
  int behind;        // keys from here on are zeros
  int lane;

  float s[Tile::keys / 2], o[Tile::depth / 2];
  float most[2], sum[2];

  // The page of key `lane` of the tile at `key`: asked for one tile before its keys are.
  MK_DEVICE int page_of(int key) const {
    key += lane;
    return table != nullptr && lane < Tile::keys && key < behind ? table[key >> p.page_shift] : 0;
  }

  // Starts copies of a tile. Rows behind the last key, and columns behind D, become zeros.
  MK_DEVICE void fetch(int stage, int key, int page) {
    const bool one_page = table == nullptr || Tile::keys <= 1 << p.page_shift;
    if (32 % Tile::pieces == 0 && one_page && key + Tile::keys <= behind) fetch_whole(stage, key, shuffle(page, 0));
    else fetch_any(stage, key, page);
  }

  // All rows are keys and lie one behind the other: addresses follow from the first by one addition each. With those of
  // fetch_any alone addresses were two thirds of a tile's instructions.
  MK_DEVICE void fetch_whole(int stage, int key, int page) {
    constexpr int high = ceil_div(32, Tile::pieces);  // rows of all lanes
    const int row = lane / Tile::pieces, piece = lane % Tile::pieces;
    const bool inside = piece * 8 < p.D;
    const std::int64_t within = (table == nullptr ? key : key & ((1 << p.page_shift) - 1)) + row;
    const T* k_from = k + (inside ? page * p.k_by.sample + within * p.k_by.token + piece * 8 : 0);
    const T* v_from = v + (inside ? page * p.v_by.sample + within * p.v_by.token + piece * 8 : 0);
    const std::int64_t k_step = inside ? high * p.k_by.token : 0, v_step = inside ? high * p.v_by.token : 0;
    unsigned char* to = stages + stage * 2 * Tile::bytes;
#pragma unroll
    for (int i = 0; i < Tile::keys / high; ++i, k_from += k_step, v_from += v_step) {
      cp_async<16>(piece_of(to, i * high + row, piece), k_from, inside ? 16 : 0);
      cp_async<16>(piece_of(to + Tile::bytes, i * high + row, piece), v_from, inside ? 16 : 0);
    }
  }

  MK_DEVICE void fetch_any(int stage, int key, int page) {
    unsigned char* to = stages + stage * 2 * Tile::bytes;
#pragma unroll 4  // more would spill registers
    for (int i = 0; i < Tile::keys * Tile::pieces / 32; ++i) {
      const int at = i * 32 + lane, row = at / Tile::pieces, piece = at % Tile::pieces;
      const std::int64_t its_page = shuffle(page, row);
      const bool inside = key + row < behind && piece * 8 < p.D;
      const std::int64_t within = table == nullptr ? key + row : (key + row) & ((1 << p.page_shift) - 1);
      const T* from = k + (inside ? its_page * p.k_by.sample + within * p.k_by.token + piece * 8 : 0);
      cp_async<16>(piece_of(to, row, piece), from, inside ? 16 : 0);
      from = v + (inside ? its_page * p.v_by.sample + within * p.v_by.token + piece * 8 : 0);
      cp_async<16>(piece_of(to + Tile::bytes, row, piece), from, inside ? 16 : 0);
    }
  }

  MK_DEVICE static unsigned char* piece_of(unsigned char* tile, int row, int piece) {
    return tile + (row * Tile::pieces + (piece ^ (row % 8))) * 16;
  }

  // s = q k^T.
  MK_DEVICE void scores(int stage) {
    unsigned char* tile = stages + stage * 2 * Tile::bytes;
#pragma unroll
    for (int i = 0; i < Tile::keys / 2; ++i) s[i] = 0;
#pragma unroll
    for (int step = 0; step < Tile::depth / 16; ++step) {
      std::uint32_t a[4];
      ldmatrix_x4(a, piece_of(q, lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int j = 0; j < Tile::keys / 16; ++j) {  // 16 keys
        std::uint32_t b[4];
        ldmatrix_x4(b, piece_of(tile, 16 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
        multiply(s + 8 * j, a, b);
      }
    }
  }

  // o += p v, p from s.
  MK_DEVICE void weigh(int stage) {
    unsigned char* tile = stages + (stage * 2 + 1) * Tile::bytes;
    std::uint32_t a[Tile::keys / 16][4];
    pack_fragment<T>(a, s);
#pragma unroll
    for (int j = 0; j < Tile::keys / 16; ++j) {
#pragma unroll
      for (int n = 0; n < Tile::depth / 16; ++n) {  // 16 columns
        std::uint32_t b[4];
        ldmatrix_x4_transposed(b, piece_of(tile, 16 * j + lane % 16, 2 * n + lane / 16));
        multiply(o + 8 * n, a[j], b);
      }
    }
  }

  // d[0..7] (16 x 16) += a b.
  MK_DEVICE static void multiply(float* d, const std::uint32_t (&a)[4], const std::uint32_t (&b)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sums[4] = {d[4 * half], d[4 * half + 1], d[4 * half + 2], d[4 * half + 3]};
      const std::uint32_t columns[2] = {b[2 * half], b[2 * half + 1]};
      mma_m16n8k16<T>(sums, a, columns);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[4 * half + i] = sums[i];
    }
  }
};

// Out: T, or float for the results of a piece.
template <class T, class Out, class Tile>
MK_KERNEL void __launch_bounds__(kDecodeThreads, Tile::resident) attention_decode_kernel(const MK_GRID_CONSTANT DecodePlan p) {
  SharedMemory shared;
  unsigned char* q = shared.take<unsigned char>(Tile::q_bytes, 128);
  unsigned char* stages = shared.take<unsigned char>(Tile::stage_bytes, 128);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  int program = int(blockIdx.x);  // blocks of the same keys are neighbours
  const int first = program % p.row_blocks * kDecodeRows;
  program /= p.row_blocks;
  const int split = program % p.splits;
  program /= p.splits;
  const int kv_heads = p.H / p.group, kv_head = program % kv_heads, sample = program / kv_heads, rows = p.T * p.group;
  const int S = p.lengths == nullptr ? p.S : p.lengths[sample];
  const AttentionMask mask = {S, S - p.T, p.left, p.right};

  // Row r of the group: query r / group, head r % group of those of the key-value head. This thread's two rows:
  const int row[2] = {first + lane / 4, first + lane / 4 + 8};
  int query[2], head[2], own_key[2], first_key[2], behind_key[2];
  float slope[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    query[h] = row[h] / p.group, head[h] = kv_head * p.group + row[h] % p.group;
    own_key[h] = query[h] + mask.offset, first_key[h] = mask.first_key(query[h]), behind_key[h] = mask.behind_key(query[h]);
    slope[h] = row[h] < rows ? p.scoring.slope(sample, head[h]) : 0.0f;
  }
  const int top = first / p.group, bottom = min(first + kDecodeRows - 1, rows - 1) / p.group;  // first and last query
  const int start = mask.first_key(top) / Tile::keys, behind = mask.behind_key(bottom);
  const int tiles = behind > start * Tile::keys ? ceil_div(behind, Tile::keys) - start : 0;
  const int piece = ceil_div(tiles, p.splits), low = start + split * piece, high = min(start + tiles, low + piece);

  DecodeWarp<T, Tile> mine{p, q, stages + warp * Tile::stages * 2 * Tile::bytes,
                           static_cast<const T*>(p.k) + kv_head * p.k_by.head, static_cast<const T*>(p.v) + kv_head * p.v_by.head,
                           nullptr, behind, lane, {}, {}, {}, {}};
  if (p.table != nullptr) mine.table = p.table + sample * p.table_stride;
  else mine.k += sample * p.k_by.sample, mine.v += sample * p.v_by.sample;
  mine.most[0] = mine.most[1] = -INFINITY;

  int page = mine.page_of((low + warp) * Tile::keys);
#pragma unroll 1
  for (int i = 0; i < Tile::stages - 1; ++i) {
    const int tile = low + warp + i * kDecodeWarps;
    if (tile < high) mine.fetch(i, tile * Tile::keys, page);
    cp_async_commit();
    page = mine.page_of((tile + kDecodeWarps) * Tile::keys);
  }
  const T* queries = static_cast<const T*>(p.q) + sample * p.q_by.sample + kv_head * p.group * p.q_by.head;
  for (int i = int(threadIdx.x); i < kDecodeRows * Tile::pieces; i += kDecodeThreads) {
    const int r = first + i / Tile::pieces, c = i % Tile::pieces * 8;
    Vector<T, 8> value = filled<T, 8>(from_float<T>(0.0f));
    if (r < rows && c < p.D) value = load<8>(queries + r / p.group * p.q_by.token + r % p.group * p.q_by.head + c);
    store_shared(reinterpret_cast<T*>(mine.piece_of(q, i / Tile::pieces, c / 8)), value);
  }
  sync_block();

  const float unit = p.plain ? p.scoring.scale : 1.0f;
  int stage = 0;
#pragma unroll 1
  for (int tile = low + warp; tile < high; tile += kDecodeWarps) {
    cp_async_wait<Tile::stages - 2>();
    sync_warp();  // what other lanes have fetched is here too, and the stage before this one is free
    const int ahead = tile + (Tile::stages - 1) * kDecodeWarps;
    if (ahead < high) mine.fetch(stage == 0 ? Tile::stages - 1 : stage - 1, ahead * Tile::keys, page);
    cp_async_commit();
    page = mine.page_of((ahead + kDecodeWarps) * Tile::keys);
    const int key = tile * Tile::keys, column = key + lane % 4 * 2;
    float fade[2];
    mine.scores(stage);
    if (!p.plain) score_fragment(mine.s, p.scoring, own_key, slope, column);
    if (key + Tile::keys > mask.behind_key(top) || key < mask.first_key(bottom)) {
      mask_fragment(mine.s, first_key, behind_key, column);
    }
    soften_fragment(mine.s, unit, mine.most, mine.sum, fade);
    if (any(fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < Tile::depth / 2; ++i) mine.o[i] *= fade[i / 2 % 2];
    }
    mine.weigh(stage);
    stage = stage == Tile::stages - 1 ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  sync_block();

  // The warps' results to shared memory, in order from there.
  float* sums = reinterpret_cast<float*>(stages);  // (warps, rows, depth)
  float* logs = sums + kDecodeWarps * kDecodeRows * Tile::depth;
  float* totals = logs + kDecodeWarps * kDecodeRows;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int line = warp * kDecodeRows + lane / 4 + 8 * h;
    float total = mine.sum[h];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    if (lane % 4 == 0) logs[line] = mine.most[h] * unit, totals[line] = total;
#pragma unroll
    for (int i = 0; i < Tile::depth / 8; ++i) {
      float* to = sums + line * Tile::depth + 8 * i + lane % 4 * 2;
      to[0] = mine.o[4 * i + 2 * h], to[1] = mine.o[4 * i + 2 * h + 1];
    }
  }
  sync_block();
  const int line = int(threadIdx.x) / 8, r = first + line;  // 8 threads a row
  if (r >= rows) return;
  float most = -INFINITY, total = 0, weight[kDecodeWarps];
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, logs[w * kDecodeRows + line]);
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) {
    weight[w] = most == -INFINITY ? 0.0f : exp2_approx(logs[w * kDecodeRows + line] - most);
    total += weight[w] * totals[w * kDecodeRows + line];
  }
  const float factor = total == 0 ? 0.0f : 1.0f / total;
  const std::int64_t t = r / p.group, h = kv_head * p.group + r % p.group;
  Out* out = static_cast<Out*>(p.out) + split * p.out_split + ((std::int64_t(sample) * p.T + t) * p.H + h) * p.D;
  for (int c = int(threadIdx.x) % 8 * 8; c < p.D; c += 64) {
    Vector<float, 8> value = filled<float, 8>(0.0f);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] += weight[w] * sums[(w * kDecodeRows + line) * Tile::depth + c + i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] *= factor;
    store(out + c, from_float<Out>(value));
  }
  if (threadIdx.x % 8 == 0) {
    const std::int64_t at = (std::int64_t(sample) * p.H + h) * p.T + t;
    p.lse[split * p.lse_split + at] = total == 0 ? -INFINITY : (most + log2_approx(total)) * kLn2;
  }
}

struct CombinePlan {
  const float *parts, *part_lse;
  void* out;
  float* lse;
  std::int64_t rows, out_split, lse_split;  // B T H
  int T, H, D, splits;
};

// A warp a row of out, from those of all pieces, in order.
template <class T>
MK_KERNEL void __launch_bounds__(kDecodeThreads) attention_combine_kernel(CombinePlan p) {
  const int lane = int(threadIdx.x) % 32;
  const std::int64_t row = std::int64_t(blockIdx.x) * kDecodeWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const std::int64_t head = row % p.H, t = row / p.H % p.T, at = (row / p.H / p.T * p.H + head) * p.T + t;
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto plus = [](float a, float b) { return a + b; };
  float most = -INFINITY, total = 0;
  for (int i = lane; i < p.splits; i += 32) most = fmaxf(most, p.part_lse[i * p.lse_split + at]);
  most = warp_reduce(most, larger);
  const float base = most == -INFINITY ? 0.0f : most;
  for (int i = lane; i < p.splits; i += 32) total += exp_approx(p.part_lse[i * p.lse_split + at] - base);
  total = warp_reduce(total, plus);
  const float log = total == 0 ? -INFINITY : base + log_approx(total), factor = total == 0 ? 0.0f : 1.0f / total;
  if (lane == 0) p.lse[at] = log;
  if (lane * 8 >= p.D) return;
  Vector<float, 8> sum = filled<float, 8>(0.0f);
  for (int i = 0; i < p.splits; ++i) {
    const float weight = exp_approx(p.part_lse[i * p.lse_split + at] - base) * factor;
    const Vector<float, 8> part = load<8>(p.parts + i * p.out_split + row * p.D + lane * 8);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += weight * part[e];
  }
  store(static_cast<T*>(p.out) + row * p.D + lane * 8, from_float<T>(sum));
}

// --- launchers ---

template <class T, int Depth>
static void launch_decode(const AttentionDecode& d, DecodePlan plan, Place place) {
  using Tile = DecodeTile<Depth>;
  const AttentionSizes& s = d.sizes;
  const Checks check("attention_decode");
  const dim3 grid(check.blocks(s.B * s.Hkv * plan.row_blocks * plan.splits)), block(kDecodeThreads);
  if (d.splits == 1) {
    plan.out = d.out, plan.lse = d.lse;
    MK_LAUNCH((attention_decode_kernel<T, T, Tile>), grid, block, Tile::shared, place, plan);
    return;
  }
  plan.out = d.parts, plan.lse = d.part_lse;
  MK_LAUNCH((attention_decode_kernel<T, float, Tile>), grid, block, Tile::shared, place, plan);
  const std::int64_t rows = s.B * s.T * s.H;
  const CombinePlan combine = {d.parts,        d.part_lse, d.out,    d.lse,    rows,
                               plan.out_split, plan.lse_split, plan.T, plan.H, plan.D, plan.splits};
  MK_LAUNCH((attention_combine_kernel<T>), dim3(check.blocks(ceil_div(rows, std::int64_t(kDecodeWarps)))), block, 0, place,
            combine);
}

void attention_decode(const AttentionDecode& d, Place place) {
  const AttentionSizes& s = d.sizes;
  AttentionChecks check("attention_decode", d.dtype, s, d.left, d.right, d.scale);
  constexpr int64_t most = AttentionChecks::most;
  check.size("rows of a group", s.T * (s.H / s.Hkv), 1, most);
  check.size("splits", d.splits, 1, 1 << 16);
  const bool pages = d.table != nullptr;
  check.require(pages == (d.lengths != nullptr), "table and lengths come in pairs");
  int shift = 0;
  if (pages) {
    check.size("page_size", d.page_size, 1, most), check.size("pages", d.pages, 1, most);
    while (int64_t(1) << shift < d.page_size) ++shift;
    check.require(int64_t(1) << shift == d.page_size, "page_size must be a power of two");
    check.size("columns", d.table_columns, 1, most / d.page_size);
    check.reads("table", d.table, Dtype::i32, s.B, d.table_columns, d.table_stride);
    check.reads("lengths", d.lengths, Dtype::i32, s.B);
  } else {
    check.size("S", s.S, 1, most);
  }
  const AttentionFeatures& f = d.features;
  check.features(f, s.B);
  check.require(f.threshold == kDropNothing, "there is no dropout here: threshold must be -2^31");
  check.rows("q", d.q, d.q_strides, s.B, s.T, s.H);
  check.rows("k", d.k, d.k_strides, pages ? d.pages : s.B, pages ? d.page_size : s.S, s.Hkv);
  check.rows("v", d.v, d.v_strides, pages ? d.pages : s.B, pages ? d.page_size : s.S, s.Hkv);
  const int64_t rows = s.B * s.T * s.H;
  check.fills("out", d.out, d.dtype, rows * s.D);
  check.writes("lse", d.lse, Dtype::f32, rows);
  if (d.splits > 1) {
    check.fills("parts", d.parts, Dtype::f32, d.splits * rows * s.D);
    check.writes("part_lse", d.part_lse, Dtype::f32, d.splits * rows);
  }

  DecodePlan plan = {};
  plan.q = d.q, plan.k = d.k, plan.v = d.v, plan.table = d.table, plan.lengths = d.lengths;
  plan.q_by = d.q_strides, plan.k_by = d.k_strides, plan.v_by = d.v_strides;
  plan.table_stride = d.table_stride, plan.out_split = rows * s.D, plan.lse_split = rows;
  plan.T = int(s.T), plan.S = int(s.S), plan.H = int(s.H), plan.group = int(s.H / s.Hkv), plan.D = int(s.D);
  plan.left = window_side(d.left), plan.right = window_side(d.right), plan.page_shift = shift;
  plan.row_blocks = int(ceil_div(s.T * (s.H / s.Hkv), int64_t(kDecodeRows))), plan.splits = int(d.splits);
  plan.plain = f.slopes == nullptr && f.softcap == 0 && d.scale > 0;
  plan.scoring = attention_scoring(d.scale, f);
  const auto with = [&](auto t) {
    using T = decltype(t);
    if (s.D <= 64) launch_decode<T, 64>(d, plan, place);
    else if (s.D <= 128) launch_decode<T, 128>(d, plan, place);
    else if (s.D <= 192) launch_decode<T, 192>(d, plan, place);
    else launch_decode<T, 256>(d, plan, place);
  };
  if (d.dtype == Dtype::bf16) with(bf16{});
  else with(fp16{});
}

}  // namespace megakern
