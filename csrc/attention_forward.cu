// Attention, forward: out = softmax(scale q k^T) v and its log sum exp, over the keys each query may see; the math is in
// megakern/ops/attention.py. Flash attention (arXiv 2205.14135) as on Hopper in arXiv 2407.08608.
//
// Writes: out and lse whole (=). Same bits at each run.
// Parallel: a block lives until its tiles are done; a tile is 128 queries of one head, of which a consumer warpgroup owns
// 64. One thread of the producer warpgroup fetches k and v in tiles of up to 128 keys, last keys first, with TMA into two
// stages each, another one q; they go on with the next tile while consumers write this one. The scores of the next keys
// run on the tensor cores beside the softmax of these; the warpgroups issue their products in turn. Two blocks of a
// cluster may share keys and values: each fetches half of them, and TMA writes it to both.
// Limits: sm_90a; bf16 and fp16; D a multiple of 8 up to 256; rows on multiples of 16 bytes.
#include <algorithm>
#include <cmath>

#include "device/attention.cuh"
#include "device/attention_checks.h"
#include "device/fragment.cuh"
#include "device/pipeline.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"

namespace megakern {

// What the kernel gets besides tensor maps.
struct AttentionPlan {
  float* lse;                       // (B, H, T), packed (H, T)
  const int *q_offsets, *k_offsets;  // packed sequences, or null
  int sequences;
  int T, S, H, group;
  int left, right;
  int heads;    // B H
  int section;  // of them in flight at a time: their keys and values fit the L2 cache
  int tiles;    // a head
  int paired, by_tiles;  // 0 or 1: blocks 2 i and 2 i + 1 have two heads of a group, or two tiles of a head: the same keys
  int sections, rounds;  // see AttentionRound
  AttentionScoring scoring;
};

// Head dims up to D, Keys at a time. Products with v are whole slabs wide: D 96 computes 128 columns of out.
template <int D, int Rows, int Keys>
struct AttentionTile {
  static constexpr int depth = D, rows = Rows, keys = Keys, stages = 2;
  static constexpr int consumers = rows / 64, threads = 128 + 128 * consumers;
  static constexpr int producer_registers = consumers == 2 ? kProducerRegisters : 32;  // a thread
  static constexpr int consumer_registers = consumers == 2 ? kConsumerRegisters : 160;
  static constexpr int slabs = ceil_div(D, 64);  // of 64 columns: 128 bytes, the width of a swizzle
  static constexpr int width = 64 * slabs;
  static constexpr int q_slab = rows * 128, kv_slab = keys * 128;
  static constexpr int q_bytes = slabs * q_slab, kv_bytes = slabs * kv_slab;
  static constexpr int most = 227 * 1024 - 2048;  // of a block on sm_90, without barriers and alignment
  static constexpr int q_stages = 2 * q_bytes + 2 * stages * kv_bytes <= most ? 2 : 1;
  // Where things lie behind one aligned address: an address each would be computed anew for each tile of keys.
  static constexpr int q = 0, k = q_stages * q_bytes, v = k + stages * kv_bytes, barriers = v + stages * kv_bytes;
  static constexpr int bytes = barriers + 8 * (2 * q_stages + 4 * stages);
  static constexpr int shared = 1024 + round_up(bytes, 16);
  static_assert(shared <= 227 * 1024, "shared memory of a block on sm_90");
  static_assert(keys / 2 + keys / 4 + width / 2 <= consumer_registers - 28, "scores, probabilities and sums of a thread");
};

// The tiles of a block, one a round of each section: there and back over the blocks, so that the sums of falling lengths are
// alike, and every other section the other way round. Fixed beforehand, and not by a counter that blocks draw from: there is
// no memory to reset, a CUDA graph replays it, and nothing depends on the clock. Of the causal tiles of 1 x 16384 x 32 x 64
// on 132 blocks the longest sum is 0.2 % above the mean (counted; with a counter 0.1 %), of 2 x 8192 x 64 x 128 0.02 %. Were
// rounds to go on across sections, long tiles would meet short ones in a round: 10 % and 0.1 %.
struct AttentionRound {
  int section = 0, round = -1;
  int index;  // of the tile in its section; -1: none in this round

  MK_DEVICE bool next(const AttentionPlan& p) {
    if (++round == p.rounds) round = 0, ++section;
    const int blocks = int(gridDim.x), block = int(blockIdx.x);
    index = round * blocks + ((round + section) % 2 == 0 ? block : blocks - 1 - block);
    if (index >= min(p.heads - section * p.section, p.section) * p.tiles) index = -1;
    return section < p.sections;
  }
};

// Where a tile lies. Longest first: under a causal mask the last queries see most keys.
struct AttentionPlace {
  int sample, head, row;          // of the first query in its sample or sequence
  int first, end;                 // key tiles first to end - 1
  int T, q_start, k_start;        // queries of the sample or sequence; packed: where it starts
  AttentionMask mask;

  MK_DEVICE AttentionPlace(const AttentionPlan& p, const AttentionRound& at, int rows, int keys) {
    const int from = at.section * p.section, across = p.by_tiles ? p.tiles : min(p.heads - from, p.section);
    const int far = at.index / across, near = at.index % across;
    const int one = from + (p.by_tiles ? far : near), tile = p.tiles - 1 - (p.by_tiles ? near : far);
    if (p.q_offsets == nullptr) {
      sample = one / p.H, head = one % p.H, row = tile * rows;
      T = p.T, q_start = k_start = 0;
      mask = {p.S, p.S - p.T, p.left, p.right};
    } else {
      const AttentionSequence s(p.q_offsets, p.k_offsets, p.sequences, tile, rows);
      sample = s.sample, head = one, row = s.first;
      T = s.length, q_start = s.start, k_start = s.other_start;
      mask = {s.other_length, s.other_length - T, p.left, p.right};
    }
    const int key = mask.first_key(row), behind = mask.behind_key(min(row + rows, T) - 1);
    first = key / keys;
    end = behind > key ? ceil_div(behind, keys) : first;
  }

  MK_DEVICE bool exists() const { return row < T; }  // packed sequences have fewer tiles than there is room for
};

// --- kernels ---

// The scores of 64 queries and a tile of keys, and what they have made so far: fragments (fragment.cuh) of 16 rows a warp.
template <class T, class Tile>
struct AttentionRows {
  float s[Tile::keys / 2], o[Tile::width / 2];
  std::uint32_t p[Tile::keys / 16][4];  // exp of the scores, as operand A
  float most[2], sum[2];                // of the row so far; sum: of this thread's columns

  MK_DEVICE void start() {
#pragma unroll
    for (int i = 0; i < Tile::keys / 2; ++i) s[i] = 0;
#pragma unroll
    for (int i = 0; i < Tile::width / 2; ++i) o[i] = 0;
    most[0] = most[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // s = q k^T. Descriptors of a stage.
  MK_DEVICE void scores(std::uint64_t q, std::uint64_t k) {
#pragma unroll
    for (int step = 0; step < Tile::depth / 16; ++step) {
      const std::uint64_t rows = descriptor_behind(q, step / 4 * Tile::q_slab + step % 4 * 32);
      const std::uint64_t keys = descriptor_behind(k, step / 4 * Tile::kv_slab + step % 4 * 32);
      wgmma_ss<T, Tile::keys, false, false>(s, rows, keys, step > 0);
    }
    wgmma_commit();
  }

  // o += p v.
  MK_DEVICE void weigh(std::uint64_t v) {
#pragma unroll
    for (int step = 0; step < Tile::keys / 16; ++step) {
      wgmma_rs<T, Tile::width, true>(o, p[step], descriptor_behind(v, step * 2048), true);
    }
    wgmma_commit();
  }

  MK_DEVICE void scale_rows(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < Tile::width / 2; ++i) o[i] *= factor[i / 2 % 2];
  }
};

// Featured: with a cap, ALiBi, dropout, or a scale that is not above 0.
template <class T, class Tile, bool Featured>
MK_KERNEL void __launch_bounds__(Tile::threads, 1)
    attention_forward_kernel(const MK_GRID_CONSTANT TensorMap q_map, const MK_GRID_CONSTANT TensorMap k_map,
                             const MK_GRID_CONSTANT TensorMap v_map, const MK_GRID_CONSTANT TensorMap out_map,
                             const MK_GRID_CONSTANT AttentionPlan plan) {
#if MK_SM90A
  SharedMemory shared;
  unsigned char* const base = shared.take<unsigned char>(Tile::bytes, 1024);
  unsigned char *q = base + Tile::q, *k = base + Tile::k, *v = base + Tile::v;
  MBarrier* q_full = reinterpret_cast<MBarrier*>(base + Tile::barriers);
  MBarrier *q_empty = q_full + Tile::q_stages, *k_full = q_empty + Tile::q_stages, *k_empty = k_full + Tile::stages;
  MBarrier *v_full = k_empty + Tile::stages, *v_empty = v_full + Tile::stages;

  const int warpgroup = warpgroup_index();
  const bool packed = plan.q_offsets != nullptr;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::q_stages; ++s) {
      mbar_init(&q_full[s], 1, "q full"), mbar_init(&q_empty[s], Tile::consumers, "q empty");
    }
    for (int s = 0; s < Tile::stages; ++s) {
      mbar_init(&k_full[s], 1, "k full"), mbar_init(&v_full[s], 1, "v full");
      const int warps = 4 * Tile::consumers << plan.paired;
      mbar_init(&k_empty[s], warps, "k empty"), mbar_init(&v_empty[s], warps, "v empty");
    }
    mbar_init_fence();
    prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map), prefetch_map(&out_map);
  }
  const bool paired = plan.paired != 0;
  if (paired) cluster_arrive(), cluster_wait();
  else sync_block();

  Ring<Tile::stages> ring;
  Ring<Tile::q_stages> q_ring;
  if (warpgroup == 0) {
    registers_shrink<Tile::producer_registers>();
    const int warp = shuffle(int(threadIdx.x) / kWarp, 0);
    constexpr int alone = -1;
    // The slabs of a tile. For both blocks of a pair each fetches every second, of k those that the other fetches of v: half
    // of the bytes for any number of slabs, in the boxes that one block fetches.
    const auto fetch = [&](unsigned char* to, const TensorMap* map, MBarrier* full, int slab, const HeadBox& box, int turn) {
      mbar_expect(full, Tile::slabs * slab);
#pragma unroll
      for (int i = 0; i < Tile::slabs; ++i) {
        if (!paired || turn == alone) tma_load_4d(to + i * slab, map, full, 64 * i, box.y, box.z, box.w);
        else if ((i + turn + int(blockIdx.x)) % 2 == 0) {
          tma_load_4d_multicast(to + i * slab, map, full, 64 * i, box.y, box.z, box.w, 3);
        }
      }
    };
    const auto for_tiles = [&](auto bring) {
#pragma unroll 1
      for (AttentionRound of_block; of_block.next(plan);) {
        if (of_block.index < 0) continue;
        const AttentionPlace at(plan, of_block, Tile::rows, Tile::keys);
        if (at.exists()) bring(at);
      }
    };
    if (warp == 0 && elect_lane()) {
      for_tiles([&](const AttentionPlace& at) {
        const int head = at.head / plan.group;
#pragma unroll 1
        for (int j = at.end - 1; j >= at.first; --j, ring.advance()) {
          const int stage = ring.stage;
          const HeadBox box(packed, at.sample, head, at.k_start, at.mask.S, j * Tile::keys, Tile::keys);
          mbar_wait(&k_empty[stage], ring.phase ^ 1);
          fetch(k + stage * Tile::kv_bytes, &k_map, &k_full[stage], Tile::kv_slab, box, 0);
          mbar_wait(&v_empty[stage], ring.phase ^ 1);
          fetch(v + stage * Tile::kv_bytes, &v_map, &v_full[stage], Tile::kv_slab, box, 1);
        }
      });
    } else if (warp == 1 && elect_lane()) {  // a thread of its own for q: one would run out of its 24 registers
      for_tiles([&](const AttentionPlace& at) {
        mbar_wait(&q_empty[q_ring.stage], q_ring.phase ^ 1);
        fetch(q + q_ring.stage * Tile::q_bytes, &q_map, &q_full[q_ring.stage], Tile::q_slab,
              {packed, at.sample, at.head, at.q_start, at.T, at.row, Tile::rows}, alone);
        q_ring.advance();
      });
    }
  } else {
    registers_grow<Tile::consumer_registers>();
    const int consumer = warpgroup - 1, thread = int(threadIdx.x % 128), lane = thread % 32;
    const int own = consumer * 64 + thread / 32 * 16 + lane / 4;  // row of s[0] in the tile
    const AttentionScoring& scoring = plan.scoring;
    const float unit = Featured ? 1.0f : scoring.scale;
    const auto release = [&](MBarrier* empty) {
      if (lane <= plan.paired) mbar_arrive_at(empty, lane);  // of both: each producer writes to both
    };
    // The softmax of the others runs beside this one's products. Consumer 0 begins.
    constexpr int n = Tile::consumers;
    const auto take_turn = [&] { consumer_sync<4, n>(consumer, 256); };
    const auto give_turn = [&] { consumer_arrive<4, n>(consumer == n - 1 ? 0 : consumer + 1, 256); };
    if (consumer == n - 1) give_turn();
    const std::uint64_t of_q = matrix_descriptor(q + consumer * 64 * 128), of_k = shuffle(matrix_descriptor(k), 0);
    const std::uint64_t of_v = shuffle(matrix_descriptor(v, 0, Tile::kv_slab), 0);
    AttentionRows<T, Tile> rows;
#pragma unroll 1
    for (AttentionRound of_block; of_block.next(plan);) {
      if (of_block.index < 0) continue;
      const AttentionPlace at(plan, of_block, Tile::rows, Tile::keys);
      if (!at.exists()) continue;
      const int row = at.row + own, top = at.row + consumer * 64;
      const int own_key[2] = {row + at.mask.offset, row + 8 + at.mask.offset};
      float slope[2] = {0, 0}, fade[2];
      std::uint64_t row_key[2] = {0, 0};
      if constexpr (Featured) {
        slope[0] = slope[1] = scoring.slope(at.sample, at.head);
        const std::uint64_t key = scoring.head_key(at.sample, at.head);
        row_key[0] = fold(key, row), row_key[1] = fold(key, row + 8);
      }
      const auto soften = [&](int j) {  // the products of key tile j become probabilities
        const int key = j * Tile::keys, column = key + lane % 4 * 2;
        if constexpr (Featured) score_fragment(rows.s, scoring, own_key, slope, column);
        if (key + Tile::keys > at.mask.behind_key(top) || key < at.mask.first_key(top + 63)) {
          const int first_key[2] = {at.mask.first_key(row), at.mask.first_key(row + 8)};
          const int behind_key[2] = {at.mask.behind_key(row), at.mask.behind_key(row + 8)};
          mask_fragment(rows.s, first_key, behind_key, column);
        }
        soften_fragment(rows.s, unit, rows.most, rows.sum, fade);
        if constexpr (Featured) {
          if (scoring.threshold != kDropNothing) drop_fragment(rows.s, row_key, scoring.threshold, column);
        }
      };
      rows.start();
      const int q_stage = q_ring.stage;
      mbar_wait(&q_full[q_stage], q_ring.phase);
      q_ring.advance();
      if (at.first < at.end) {
        const std::uint64_t q_now = descriptor_behind(of_q, q_stage * Tile::q_bytes);
        mbar_wait(&k_full[ring.stage], ring.phase);
        take_turn();
        wgmma_fence(rows.s);
        rows.scores(q_now, descriptor_behind(of_k, ring.stage * Tile::kv_bytes));
        give_turn();
        wgmma_wait<0>(rows.s);
        release(&k_empty[ring.stage]);
        soften(at.end - 1);
        int j = at.end - 2;  // the tile of keys whose scores come next; ring: of the one before
        // The softmax is the end of the loop's body and the wait for the product with v its beginning: within one piece of
        // code without branches ptxas moves that wait to the softmax's front, and nothing runs beside it.
#pragma unroll 1
        for (;; --j) {
          wgmma_wait<0>(rows.o, rows.s);
          if (j < at.end - 2) release(&v_empty[ring.stage ^ 1]);
          if (any(fade[0] != 1.0f || fade[1] != 1.0f)) rows.scale_rows(fade);
          pack_fragment<T>(rows.p, rows.s);
          if (j < at.first) break;
          const int stage = ring.stage, phase = ring.phase;
          ring.advance();
          mbar_wait(&k_full[ring.stage], ring.phase);
          take_turn();
          wgmma_fence(rows.s);
          rows.scores(q_now, descriptor_behind(of_k, ring.stage * Tile::kv_bytes));
          mbar_wait(&v_full[stage], phase);
          wgmma_fence(rows.o, rows.p);
          rows.weigh(descriptor_behind(of_v, stage * Tile::kv_bytes));
          give_turn();
          wgmma_wait<1>(rows.s);
          release(&k_empty[ring.stage]);
          if (Featured && Tile::depth > 128) wgmma_wait<0>(rows.o);  // the features need the registers of p
          soften(j);
        }
        mbar_wait(&v_full[ring.stage], ring.phase);
        wgmma_fence(rows.o, rows.p);
        rows.weigh(descriptor_behind(of_v, ring.stage * Tile::kv_bytes));
        wgmma_wait<0>(rows.o);
        release(&v_empty[ring.stage]);
        ring.advance();
      }

      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = rows.sum[h];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        factor[h] = sum == 0 ? 0.0f : (Featured ? scoring.kept : 1.0f) / sum;
        const int t = row + 8 * h;
        if (lane % 4 == 0 && t < at.T) {
          const std::int64_t line = packed ? at.head : std::int64_t(at.sample) * plan.H + at.head;
          plan.lse[line * plan.T + at.q_start + t] = sum == 0 ? -INFINITY : (rows.most[h] * unit + log2_approx(sum)) * kLn2;
        }
      }
      rows.scale_rows(factor);
      unsigned char* const own_q = q + q_stage * Tile::q_bytes + consumer * 64 * 128;
      consumer_sync<1, n>(consumer, 128);  // all products that read this part of q are done
#pragma unroll
      for (int i = 0; i < Tile::slabs; ++i) {
        write_fragment<T>(own_q + i * Tile::q_slab + thread / 32 * 16 * 128, rows.o + 32 * i, lane);
      }
      fence_async();
      consumer_sync<1, n>(consumer, 128);
      if (thread == 0) {
        if (top < at.T) {
          const HeadBox box(packed, at.sample, at.head, at.q_start, at.T, top, 64);
#pragma unroll
          for (int i = 0; i < Tile::slabs; ++i) {
            tma_store_4d(&out_map, own_q + i * Tile::q_slab, 64 * i, box.y, box.z, box.w);
          }
          tma_commit();
          tma_wait_read<0>();
        }
        mbar_arrive(&q_empty[q_stage]);
      }
    }
    if (consumer == 0) take_turn();  // the one that nobody took
    if (thread == 0) tma_wait<0>();
  }
  // Neither leaves while the other may still write to its shared memory or arrive at its barriers.
  if (paired) cluster_arrive(), cluster_wait();
#endif
}

// --- launchers ---

template <class T, class Tile, bool Options>
static void launch_attention(const AttentionForward& p, Place place) {
  const AttentionSizes& s = p.sizes;
  const bool packed = p.q_offsets != nullptr;
  const AttentionStrides dense = {s.T * s.H * s.D, s.H * s.D, s.D};
  const TensorMap q = head_map(p.q, p.dtype, s.B, s.T, s.H, s.D, p.q_strides, Tile::rows, packed);
  const TensorMap k = head_map(p.k, p.dtype, s.B, s.S, s.Hkv, s.D, p.k_strides, Tile::keys, packed);
  const TensorMap v = head_map(p.v, p.dtype, s.B, s.S, s.Hkv, s.D, p.v_strides, Tile::keys, packed);
  const TensorMap out = head_map(p.out, p.dtype, s.B, s.T, s.H, s.D, dense, 64, packed);
  const Checks check("attention_forward");
  const int64_t tiles = packed ? s.T / Tile::rows + p.sequences : ceil_div(s.T, int64_t(Tile::rows));
  check.size("tiles", s.B * s.H * tiles, 1, 1 << 30);
  AttentionPlan plan = {};
  plan.lse = p.lse, plan.q_offsets = p.q_offsets, plan.k_offsets = p.k_offsets, plan.sequences = int(p.sequences);
  plan.T = int(s.T), plan.S = int(s.S), plan.H = int(s.H), plan.group = int(s.H / s.Hkv);
  plan.left = window_side(p.left), plan.right = window_side(p.right);
  plan.heads = int(s.B * s.H), plan.section = int(std::min(p.section, s.B * s.H));
  plan.paired = p.pairs != AttentionPairs::none, plan.by_tiles = p.pairs == AttentionPairs::tiles;
  check.require(p.pairs != AttentionPairs::heads || (plan.group % 2 == 0 && plan.section % 2 == 0),
                "pairs of heads are for an even number of query heads of each head of keys, and in a section; got " +
                    std::to_string(plan.group) + " and " + std::to_string(plan.section));
  check.require(!plan.by_tiles || (!packed && p.left < 0 && p.right < 0 && tiles % 2 == 0),
                "pairs of tiles are for an even number of tiles, each of which sees all keys, and not packed");
  plan.tiles = int(tiles), plan.sections = ceil_div(plan.heads, plan.section);
  const int cluster = plan.paired ? 2 : 1, clusters = std::max(1, int(p.blocks) / cluster);
  const dim3 grid(unsigned(std::min(plan.heads * plan.tiles, clusters * cluster))), block(Tile::threads);
  plan.rounds = ceil_div(plan.section * plan.tiles, int(grid.x));
  plan.scoring = attention_scoring(p.scale, p.features);
  const AttentionFeatures& f = p.features;
  if (f.slopes == nullptr && f.softcap == 0 && f.threshold == kDropNothing && p.scale > 0) {
    MK_LAUNCH_CLUSTER((attention_forward_kernel<T, Tile, false>), grid, block, Tile::shared, cluster, place, q, k, v, out, plan);
  } else if constexpr (Options) {
    MK_LAUNCH_CLUSTER((attention_forward_kernel<T, Tile, true>), grid, block, Tile::shared, cluster, place, q, k, v, out, plan);
  } else {
    check.require(false, "this tile is for a scale above 0 without cap, ALiBi and dropout");
  }
}

// The first tile of a head dim has all options; the others are for plain scores.
template <class T>
static void launch_tile(const AttentionForward& p, Place place) {
  const auto is = [&](int D, int rows, int keys) { return p.sizes.D <= D && p.tile_rows == rows && p.tile_keys == keys; };
  if (is(64, 128, 128)) launch_attention<T, AttentionTile<64, 128, 128>, true>(p, place);
  else if (is(64, 192, 128)) launch_attention<T, AttentionTile<64, 192, 128>, false>(p, place);
  else if (is(96, 128, 128)) launch_attention<T, AttentionTile<96, 128, 128>, true>(p, place);
  else if (is(128, 128, 128)) launch_attention<T, AttentionTile<128, 128, 128>, true>(p, place);
  else if (is(128, 128, 176)) launch_attention<T, AttentionTile<128, 128, 176>, false>(p, place);
  else if (is(192, 128, 112)) launch_attention<T, AttentionTile<192, 128, 112>, true>(p, place);
  else if (is(256, 128, 80)) launch_attention<T, AttentionTile<256, 128, 80>, true>(p, place);
  else {
    Checks("attention_forward").require(false, "there is no tile of " + std::to_string(p.tile_rows) + " queries and " +
                                                   std::to_string(p.tile_keys) + " keys for D " + std::to_string(p.sizes.D));
  }
}

void attention_forward(const AttentionForward& p, Place place) {
  const AttentionSizes& s = p.sizes;
  AttentionChecks check("attention_forward", p.dtype, s, p.left, p.right, p.scale);
  check.size("S", s.S, 1, check.most), check.size("section", p.section, 1, check.most);
  check.size("blocks", p.blocks, 1, 1 << 16), check.known("pairs", p.pairs, AttentionPairs::tiles);
  const bool packed = check.offsets(p.q_offsets, p.k_offsets, p.sequences);
  check.features(p.features, packed ? p.sequences : s.B);
  check.rows("q", p.q, p.q_strides, s.B, s.T, s.H);
  check.rows("k", p.k, p.k_strides, s.B, s.S, s.Hkv);
  check.rows("v", p.v, p.v_strides, s.B, s.S, s.Hkv);
  check.fills("out", p.out, p.dtype, s.B * s.T * s.H * s.D);
  check.writes("lse", p.lse, Dtype::f32, s.B * s.H * s.T);
  if (p.dtype == Dtype::bf16) launch_tile<bf16>(p, place);
  else launch_tile<fp16>(p, place);
}

}  // namespace megakern
