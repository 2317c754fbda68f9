// Attention, backward: dq, dk, dv; the math is in megakern/ops/attention.py. Flash attention's backward pass (arXiv
// 2205.14135) with the roles of warps as on Hopper in arXiv 2407.08608. Three kernels:
//
//   rows    delta = sum over D of dout out, lse in powers of two, zeros for the sums of dq     a block: a tile of queries
//   main    dk, dv, and dq added to fp32 sums tile by tile                             a block: 64 or 128 keys
//   dq      the sums times scale, rounded                                                       a block: a tile of queries
//
// Writes: dq, dk, dv whole (=). With turns a query's dq is added up in the order of the keys, so that it has the same
// bits at each run; without, in any order. dk and dv have the same bits in any case.
// Parallel (main): a block owns 128 keys of one head of keys, each of two consumer warpgroups 64 of them (D above 128: 64
// keys, half of the columns), and walks the queries that see them, of all query heads of the group: tiles of 128 (D up to
// 64), 64 or 80. One thread of the third
// warpgroup fetches them with TMA into two stages; one warp of it adds dq to device memory. Scores are computed as (keys,
// queries): then p and ds are operands from registers for dv and dk, and ds alone goes through shared memory, for dq.
// Limits: sm_90a; bf16 and fp16; D a multiple of 8 up to 256; rows on multiples of 16 bytes.
#include <cmath>

#include "attention_backward.cuh"
#include "attention_backward_keys.cuh"
#include "device/attention_checks.h"
#include "device/pipeline.cuh"

namespace megakern {

// Where one block works. Low keys come first: under a causal mask most queries see them. Where the order of additions is
// fixed, high keys: of the blocks that add to a tile of queries, the one with the last keys begins there, the others come to
// it later the lower their keys, so that under a causal mask nobody waits; and whoever waits, waits for a block that has
// started before.
template <class Tile>
struct BackwardPlace {
  int sample, head, key;       // of keys; the first of the tile
  int q_start, k_start, T, S;  // of the sequence
  int first, end;              // tiles of queries that see these keys
  int line;                    // of tile 0 of the first query head
  AttentionMask mask;

  MK_DEVICE BackwardPlace(const BackwardPlan& p, int index) {
    const int whole = p.section * p.k_tiles, from = index / whole * p.section, within = index % whole;
    const int heads = min(p.heads - from, p.section), one = from + within % heads;
    const int tile = p.turns == nullptr ? within / heads : p.k_tiles - 1 - within / heads;
    const int of_sample = p.H / p.group;
    sample = one / of_sample, head = one % of_sample;
    line = (sample * p.H + head * p.group) * p.q_tiles;
    key = tile * Tile::keys, q_start = k_start = 0, T = p.T, S = p.S;
    if (p.q_offsets != nullptr) {
      const AttentionSequence s(p.k_offsets, p.q_offsets, p.sequences, tile, Tile::keys);
      sample = s.sample, key = s.first, k_start = s.start, S = s.length, q_start = s.other_start, T = s.other_length;
      line += q_start / Tile::rows + sample;
    }
    mask = {S, S - T, p.left, p.right};
    first = mask.first_query(key) / Tile::rows;
    const int behind = key < S ? mask.behind_query(min(key + Tile::keys, S) - 1, T) : 0;
    end = max(first, ceil_div(max(behind, 0), Tile::rows));
  }
};

// --- kernels ---

// Adds the parts of dq that the consumers leave in shared memory to the sums, by one warp.
template <class Tile>
MK_DEVICE void add_queries(const BackwardPlan& plan, const BackwardPlace<Tile>& at, const float* parts) {
  const int steps = plan.group * (at.end - at.first);
  if (steps == 0) return;
  barrier_arrive<5>(160), barrier_arrive<6>(160);
  int tile = at.first, line = at.line;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    float* to = plan.dq_sums + std::int64_t(line + tile) * Tile::line;
    int* turn = plan.turns + line + tile;
    const auto add = [&](int consumer, int piece) {
      if (elect_lane()) {
        bulk_add(to + (consumer * Tile::pieces + piece) * Tile::part, parts + consumer * Tile::part, Tile::part * 4);
        tma_commit();
        tma_wait_read<0>();
      }
      sync_warp();
    };
#pragma unroll
    for (int piece = 0; piece < Tile::pieces; ++piece) {
      const bool more = piece + 1 < Tile::pieces || step + 1 < steps;
      barrier_sync<3>(160);
      if (piece == 0 && plan.turns != nullptr && elect_lane()) {
        const int last = at.mask.behind_key((tile + 1) * Tile::rows - 1) - 1, mine = last / Tile::keys - at.key / Tile::keys;
        while (atomic_add(turn, 0) != mine) yield_thread();
        fence_device();
      }
      add(0, piece);
      if (more) barrier_arrive<5>(160);
      barrier_sync<4>(160);
      add(1, piece);
      if (more) barrier_arrive<6>(160);
    }
    if (plan.turns != nullptr && elect_lane()) {
      tma_wait<0>();
      fence_device();
      atomic_add(turn, 1);
    }
    sync_warp();
    if (++tile == at.end) tile = at.first, line += plan.q_tiles;
  }
  if (elect_lane()) tma_wait<0>();
}

// Featured: cap, ALiBi, dropout.
template <class T, int D, int Rows, bool Featured>
MK_KERNEL void __launch_bounds__(kPipelineThreads, 1)
    attention_backward_kernel(const MK_GRID_CONSTANT TensorMap q_map, const MK_GRID_CONSTANT TensorMap k_map,
                              const MK_GRID_CONSTANT TensorMap v_map, const MK_GRID_CONSTANT TensorMap dout_map,
                              const MK_GRID_CONSTANT TensorMap dk_map, const MK_GRID_CONSTANT TensorMap dv_map,
                              const MK_GRID_CONSTANT BackwardPlan plan) {
#if MK_SM90A
  using Tile = BackwardTile<D, Rows>;
  constexpr int rows = Tile::rows, span = Tile::span, stages = Tile::stages, dout_stages = Tile::dout_stages;
  constexpr bool late = Featured && D > 64;  // dp after p: with both under way registers run out
  constexpr bool ahead = !late && !Tile::split;  // dp of the next queries behind their scores: the tensor cores never wait
  const BackwardPlace<Tile> at(plan, int(blockIdx.x));
  if (at.key >= at.S) return;
  const bool packed = plan.q_offsets != nullptr;
  const int steps = plan.group * (at.end - at.first);

  SharedMemory shared;
  unsigned char* const base = shared.take<unsigned char>(Tile::bytes, 1024);
  unsigned char *k = base + Tile::k, *v = base + Tile::v, *q = base + Tile::q, *dout = base + Tile::dout;
  unsigned char* ds = base + Tile::ds;
  float* dq = reinterpret_cast<float*>(base + Tile::dq);
  float *lse = reinterpret_cast<float*>(base + Tile::lse), *delta = reinterpret_cast<float*>(base + Tile::delta);
  std::uint64_t* row_keys = reinterpret_cast<std::uint64_t*>(base + Tile::row_keys);
  MBarrier* kv_full = reinterpret_cast<MBarrier*>(base + Tile::barriers);
  MBarrier *q_full = kv_full + 1, *q_empty = q_full + stages, *dout_full = q_empty + stages, *dout_empty = dout_full + dout_stages;

  const int warpgroup = warpgroup_index(), thread = int(threadIdx.x) % 128, lane = thread % 32;
  if (threadIdx.x == 0) {
    mbar_init(kv_full, 1, "k, v full");
    for (int s = 0; s < stages; ++s) {
      mbar_init(&q_full[s], 1, "q full"), mbar_init(&q_empty[s], 8, "q empty");  // one arrival a warp
    }
    for (int s = 0; s < dout_stages; ++s) {
      mbar_init(&dout_full[s], 1, "dout full"), mbar_init(&dout_empty[s], 8, "dout empty");
    }
    mbar_init_fence();
    prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map), prefetch_map(&dout_map);
  }
  sync_block();

  Ring<stages> ring;
  if (warpgroup == 0) {
    registers_shrink<kProducerRegisters>();
    if (thread < kWarp && steps > 0 && elect_lane()) {
      const auto fetch = [&](unsigned char* to, const TensorMap* map, MBarrier* full, int slab, const HeadBox& box) {
#pragma unroll
        for (int i = 0; i < Tile::slabs; ++i) tma_load_4d(to + i * slab, map, full, 64 * i, box.y, box.z, box.w);
      };
      const HeadBox keys(packed, at.sample, at.head, at.k_start, at.S, at.key, Tile::keys);
      mbar_expect(kv_full, 2 * Tile::kv_bytes);
      fetch(k, &k_map, kv_full, Tile::kv_slab, keys);
      fetch(v, &v_map, kv_full, Tile::kv_slab, keys);
      const bool drops = plan.row_keys != nullptr;
      int tile = at.first, line = at.line, head = at.head * plan.group;
#pragma unroll 1
      for (int step = 0; step < steps; ++step, ring.advance()) {
        const int s = ring.stage, d = dout_stages == 1 ? 0 : s, d_phase = dout_stages == 1 ? step % 2 : ring.phase;
        const HeadBox queries(packed, at.sample, head, at.q_start, at.T, tile * rows, rows);
        const float* statistics = plan.statistics + std::int64_t(line + tile) * 2 * rows;
        mbar_wait(&q_empty[s], ring.phase ^ 1);
        mbar_expect(&q_full[s], Tile::q_bytes + rows * 4);
        fetch(q + s * Tile::q_bytes, &q_map, &q_full[s], Tile::q_slab, queries);
        bulk_load(lse + s * rows, statistics, &q_full[s], rows * 4);
        mbar_wait(&dout_empty[d], d_phase ^ 1);
        mbar_expect(&dout_full[d], Tile::q_bytes + rows * (drops ? 12 : 4));
        fetch(dout + d * Tile::q_bytes, &dout_map, &dout_full[d], Tile::q_slab, queries);
        bulk_load(delta + d * rows, statistics + rows, &dout_full[d], rows * 4);
        if (drops) {
          bulk_load(row_keys + d * rows, plan.row_keys + std::int64_t(line + tile) * rows, &dout_full[d], rows * 8);
        }
        if (++tile == at.end) tile = at.first, line += plan.q_tiles, ++head;
      }
    } else if (thread / 32 == 1 && !plan.from_registers) {
      add_queries<Tile>(plan, at, dq);
    }
  } else {
    registers_grow<kConsumerRegisters>();
    const int consumer = warpgroup - 1, warp = thread / 32;
    const int below = Tile::split ? 0 : 64 * consumer;  // its first key of the tile
    const int from = at.key + below, key = from + warp * 16 + lane / 4;  // the same in the sequence; the thread's first
    const int slab = Tile::split ? 2 * consumer : 0;                     // its first of dk and dv
    const int ds_own = Tile::split || Tile::turned ? consumer * Tile::ds_slab : below * 128;  // of ds, where its own begin
    const auto release = [&](MBarrier* empty) {
      if (lane == 0) mbar_arrive(empty);
    };
    using Keys = BackwardKeys<T, Tile>;
    Keys own;
#pragma unroll
    for (int i = 0; i < Keys::columns / 2; ++i) own.dk[i] = own.dv[i] = 0;
    if (steps > 0) {
      mbar_wait(kv_full, 0);
      own.k.hold(k + below * 128, warp, lane), own.v.hold(v + below * 128, warp, lane);
      // Rows of queries as B of products over D, and as B of dv and dk over queries; ds and k as operands of dq.
      const std::uint64_t of_q = matrix_descriptor(q), of_dout = matrix_descriptor(dout);
      const std::uint64_t q_columns = matrix_descriptor(q + slab * Tile::q_slab, 0, Tile::q_slab);
      const std::uint64_t dout_columns = matrix_descriptor(dout + slab * Tile::q_slab, 0, Tile::q_slab);
      const std::uint64_t of_ds = matrix_descriptor(ds + (D == 128 ? 0 : consumer * Tile::ds_slab));
      const std::uint64_t of_k = matrix_descriptor(k + (D == 64 ? 0 : Tile::pieces * consumer * Tile::kv_slab));
      int tile = at.first, line = at.line, head = at.head * plan.group;
      float slope = Featured ? plan.scoring.slope(at.sample, head) : 0.0f;
      typename Keys::Sums next, dp;  // next: scores of the next queries, under way; split: registers do not suffice
      if (!Tile::split) {
        mbar_wait(&q_full[0], 0);
        own.multiply(next, own.k, of_q);
      }
      if (ahead) {
        mbar_wait(&dout_full[0], 0);
        own.multiply(dp, own.v, of_dout);
        wgmma_wait<1>(next);
      }
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const int stage = ring.stage, dout_stage = dout_stages == 1 ? 0 : stage;
        const int phase = ring.phase, dout_phase = dout_stages == 1 ? step % 2 : phase;
        ring.advance();
        unsigned char* ds_now = ds + step % 2 * Tile::ds_bytes;
        typename Keys::Operand p, change;  // here: the products that read them run on when a half is done
#pragma unroll
        for (int half = 0; half < rows / span; ++half) {  // the queries of a product
          const int q_place = stage * Tile::q_bytes + half * span * 128;
          const int dout_place = dout_stage * Tile::q_bytes + half * span * 128;
          typename Keys::Sums now;
          typename Keys::Sums& s = Tile::split ? now : next;
          if (Tile::split) {
            mbar_wait(&q_full[stage], phase);
            own.multiply(s, own.k, descriptor_behind(of_q, q_place));
          }
          if (!ahead) mbar_wait(&dout_full[dout_stage], dout_phase);

          const int row = tile * rows + half * span, column = lane % 4 * 2;  // this thread's first query: row + column
          const int lse_place = stage * rows + half * span + column, delta_place = dout_stage * rows + half * span + column;
          const bool masked = from + 64 > at.mask.behind_key(row) || from < at.mask.first_key(row + span - 1);
          const int distance = key - (row + column + at.mask.offset);
          const std::uint64_t* keys = plan.row_keys == nullptr ? nullptr : row_keys + delta_place;
          std::uint32_t kept = 0;
          if (Tile::split && !late) {
            own.multiply(dp, own.v, descriptor_behind(of_dout, dout_place));
            wgmma_wait<1>(s);
          } else if (!ahead) {
            wgmma_wait<0>(s, own.dv, own.dk);
          }
          if constexpr (Featured) {
            kept = own.featured(s, p, plan.scoring, lse + lse_place, keys, at.mask, key, distance, slope);
          } else if (masked) {
            own.template probabilities<true>(s, p, plan.scoring.scale, lse + lse_place, at.mask, key, distance);
          } else {
            own.template probabilities<false>(s, p, plan.scoring.scale, lse + lse_place, at.mask, key, distance);
          }
          if (late) own.multiply(dp, own.v, descriptor_behind(of_dout, dout_place));
          if (ahead) wgmma_wait<0>(dp);
          const std::uint64_t dout_now = descriptor_behind(dout_columns, dout_place);
          const float* of_delta = delta + delta_place;
          wgmma_fence(own.dv, Keys::template steps<0, Keys::early>(p));
          own.template accumulate<0, Keys::early>(own.dv, p, dout_now);
          if (!ahead) wgmma_wait<1>(dp);
          own.template differences<Featured, 0, Keys::middle>(change, s, dp, kept, of_delta, plan.scoring.kept);
          if constexpr (Tile::turned) {  // the rest of p
            own.template pack<Keys::early, Keys::middle>(p, s);
            wgmma_fence(Keys::template steps<Keys::early, Keys::middle>(p));
            own.template accumulate<Keys::early, Keys::middle>(own.dv, p, dout_now);
            own.template differences<Featured, Keys::middle, span / 16>(change, s, dp, kept, of_delta, plan.scoring.kept);
            own.template pack<Keys::middle, span / 16>(p, s);
            wgmma_fence(Keys::template steps<Keys::middle, span / 16>(p));
            own.template accumulate<Keys::middle, span / 16>(own.dv, p, dout_now);
          }
          wgmma_fence(own.dk, change);
          own.accumulate(own.dk, change, descriptor_behind(q_columns, q_place));
          own.share(change, ds_now + ds_own + half * Tile::ds_slab, warp, lane);
          fence_async();
          if (half + 1 < rows / span) {
            own.multiply(next, own.k, descriptor_behind(of_q, q_place + span * 128));
            if (ahead) {
              own.multiply(dp, own.v, descriptor_behind(of_dout, dout_place + span * 128));
              wgmma_wait<1>(next, own.dv, own.dk);
            }
          }
        }
        if (Tile::split) consumer_sync<1>(consumer, 128);
        else barrier_sync<7>(256);  // ds of both consumers
        const std::uint64_t ds_part = descriptor_behind(of_ds, step % 2 * Tile::ds_bytes);
        const bool last = step + 1 == steps;
        const int after = last ? stage : ring.stage;
        // The next scores run beside the store of dq. The last step computes its own again, and nobody reads them.
        const auto next_scores = [&] {
          if (!last) mbar_wait(&q_full[after], ring.phase);
          own.multiply(next, own.k, descriptor_behind(of_q, after * Tile::q_bytes));
        };
        const auto four = [](const typename Keys::Sums& part, int i) {
          return Vector<float, 4>{part[4 * i], part[4 * i + 1], part[4 * i + 2], part[4 * i + 3]};
        };
        const auto put = [&](const typename Keys::Sums& part, int piece) {
          if (plan.from_registers) {
            float* to = plan.dq_sums + std::int64_t(line + tile) * Tile::line;
            to += (consumer * Tile::pieces + piece) * Tile::part;
#pragma unroll
            for (int i = 0; i < span / 8; ++i) add_four(to + 512 * i + 4 * thread, four(part, i).values);
            return;
          }
          consumer_sync<5>(consumer, 160);  // the part before has been read
#pragma unroll
          for (int i = 0; i < span / 8; ++i) {
            store_shared(dq + consumer * Tile::part + 512 * i + 4 * thread, four(part, i));
          }
          fence_async();
          if (consumer == 0) barrier_arrive<3>(160);
          else barrier_arrive<4>(160);
        };
        typename Keys::Sums part;
        if constexpr (Tile::turned) wgmma_wait<1>(own.dv);  // its p is where dq will be
        wgmma_fence(part);
        own.weigh_queries(part, ds_part, of_k);
        wgmma_wait<1>(own.dv, own.dk);
        if constexpr (Tile::pieces == 1) {
          next_scores();
          release(&q_empty[stage]), release(&dout_empty[dout_stage]);
          wgmma_wait<1>(part);
          put(part, 0);
          if (ahead) {
            if (!last) mbar_wait(&dout_full[after], ring.phase);
            own.multiply(dp, own.v, descriptor_behind(of_dout, after * Tile::q_bytes));
            wgmma_wait<1>(next);
          }
        } else {
          typename Keys::Sums other;
          wgmma_wait<0>(part);
          wgmma_fence(other);
          own.weigh_queries(other, ds_part, descriptor_behind(of_k, Tile::kv_slab));
          release(&dout_empty[dout_stage]);
          put(part, 0);
          release(&q_empty[stage]);
          wgmma_wait<0>(other);
          put(other, 1);
        }
        if (++tile == at.end) {
          tile = at.first, line += plan.q_tiles, ++head;
          if (Featured && step + 1 < steps) slope = plan.scoring.slope(at.sample, head);
        }
      }
      if (!Tile::split) wgmma_wait<0>(next, dp);
    }

#pragma unroll
    for (int i = 0; i < Keys::columns / 2; ++i) {
      own.dk[i] *= plan.scale;
      if (Featured) own.dv[i] *= plan.scoring.kept;
    }
    barrier_sync<7>(256);  // all products that read k and v are done
#pragma unroll
    for (int i = 0; i < Tile::own_slabs; ++i) {
      const int place = (slab + i) * Tile::kv_slab + (below + warp * 16) * 128;
      write_fragment<T>(k + place, own.dk + 32 * i, lane);
      write_fragment<T>(v + place, own.dv + 32 * i, lane);
    }
    fence_async();
    consumer_sync<1>(consumer, 128);
    if (thread < kWarp && from < at.S && elect_lane()) {
      const HeadBox box(packed, at.sample, at.head, at.k_start, at.S, from, 64);
#pragma unroll
      for (int i = slab; i < slab + Tile::own_slabs; ++i) {
        const int place = i * Tile::kv_slab + below * 128;
        tma_store_4d(&dk_map, k + place, 64 * i, box.y, box.z, box.w);
        tma_store_4d(&dv_map, v + place, 64 * i, box.y, box.z, box.w);
      }
      tma_commit();
      tma_wait<0>();
    }
  }
#endif
}

// --- launchers ---

template <class T, int D, int Rows>
static void launch_backward(const AttentionBackward& p, AttentionChecks& check, Place place) {
  using Tile = BackwardTile<D, Rows>;
  const AttentionSizes& s = p.sizes;
  const bool packed = p.q_offsets != nullptr, plain = p.features.softcap == 0 && !p.features.slopes && !p.row_keys;
  const int64_t rows = Tile::rows, keys = Tile::keys;
  if (Tile::turned) {
    check.require(plain, "tiles of " + std::to_string(rows) + " queries are for scores without cap, ALiBi and dropout");
  }
  const int64_t q_tiles = packed ? s.T / rows + p.sequences : ceil_div(s.T, rows);
  const int64_t k_tiles = packed ? s.S / keys + p.sequences : ceil_div(s.S, keys), lines = s.B * s.H * q_tiles;
  check.require(p.lines == lines, "scratch memory must have " + std::to_string(lines) + " lines, got " + std::to_string(p.lines));
  check.size("lines", lines, 1, kInt32Max);
  check.fills("dq_sums", p.dq_sums, Dtype::f32, lines * rows * D);
  check.fills("statistics", p.statistics, Dtype::f32, lines * 2 * rows);
  if (p.row_keys) check.fills("row_keys", p.row_keys, Dtype::i64, lines * rows);
  if (p.turns) check.writes("turns", p.turns, Dtype::i32, lines);

  const AttentionStrides q_dense = {s.T * s.H * s.D, s.H * s.D, s.D}, k_dense = {s.S * s.Hkv * s.D, s.Hkv * s.D, s.D};
  const auto of_queries = [&](const void* x, const AttentionStrides& by, int box) {
    return head_map(x, p.dtype, s.B, s.T, s.H, s.D, by, box, packed);
  };
  const auto of_keys = [&](const void* x, const AttentionStrides& by, int box) {
    return head_map(x, p.dtype, s.B, s.S, s.Hkv, s.D, by, box, packed);
  };
  const TensorMap q = of_queries(p.q, p.q_strides, Tile::rows), dout = of_queries(p.dout, p.dout_strides, Tile::rows);
  const TensorMap k = of_keys(p.k, p.k_strides, Tile::keys), v = of_keys(p.v, p.v_strides, Tile::keys);
  const TensorMap dq = of_queries(p.dq, q_dense, Tile::span);
  const TensorMap dk = of_keys(p.dk, k_dense, 64), dv = of_keys(p.dv, k_dense, 64);

  BackwardPlan plan = {};
  plan.from_registers = p.from_registers, plan.dq_sums = p.dq_sums, plan.statistics = p.statistics, plan.turns = p.turns;
  plan.row_keys = reinterpret_cast<std::uint64_t*>(p.row_keys);
  plan.q_offsets = p.q_offsets, plan.k_offsets = p.k_offsets, plan.sequences = int(p.sequences);
  plan.T = int(s.T), plan.S = int(s.S), plan.H = int(s.H), plan.group = int(s.H / s.Hkv);
  plan.heads = int(s.B * s.Hkv), plan.section = int(p.section);
  plan.q_tiles = int(q_tiles), plan.k_tiles = int(k_tiles);
  plan.left = window_side(p.left), plan.right = window_side(p.right), plan.scale = p.scale;
  plan.scoring = attention_scoring(p.scale, p.features);

  const BackwardRows edges = {p.dout, p.out, p.lse, p.dout_strides, p.out_strides, int(s.D)};
  MK_LAUNCH((backward_rows_kernel<T, D, Rows>), dim3(check.blocks(lines)), dim3(kRowThreads), 0, place, edges, plan);
  const dim3 blocks(check.blocks(s.B * s.Hkv * k_tiles)), threads(kPipelineThreads);
  if (plain) {
    MK_LAUNCH((attention_backward_kernel<T, D, Rows, false>), blocks, threads, Tile::shared, place, q, k, v, dout, dk, dv,
              plan);
  } else if constexpr (!Tile::turned) {
    MK_LAUNCH((attention_backward_kernel<T, D, Rows, true>), blocks, threads, Tile::shared, place, q, k, v, dout, dk, dv,
              plan);
  }
  MK_LAUNCH((backward_dq_kernel<T, D, Rows>), dim3(check.blocks(lines)), dim3(256 * Tile::pieces), 1024 + Tile::line * 2,
            place, dq, plan);
}

template <class T>
static void launch_tile(const AttentionBackward& p, AttentionChecks& check, Place place) {
  const std::int64_t D = p.sizes.D;
  const auto is = [&](int above, int most, int rows) { return D > above && D <= most && p.tile_rows == rows; };
  if (is(0, 64, 128)) launch_backward<T, 64, 128>(p, check, place);
  else if (is(64, 128, 64)) launch_backward<T, 128, 64>(p, check, place);
  else if (is(64, 128, 80)) launch_backward<T, 128, 80>(p, check, place);
  else if (is(128, 256, 64)) launch_backward<T, 256, 64>(p, check, place);
  else check.require(false, "there is no tile of " + std::to_string(p.tile_rows) + " queries for D " + std::to_string(D));
}

void attention_backward(const AttentionBackward& p, Place place) {
  const AttentionSizes& s = p.sizes;
  AttentionChecks check("attention_backward", p.dtype, s, p.left, p.right, p.scale);
  check.size("S", s.S, 1, check.most), check.size("section", p.section, 1, check.most);
  const bool packed = check.offsets(p.q_offsets, p.k_offsets, p.sequences);
  check.features(p.features, packed ? p.sequences : s.B);
  check.require(!p.turns || !p.from_registers, "turns are for sums added by way of shared memory, not from registers");
  check.rows("q", p.q, p.q_strides, s.B, s.T, s.H), check.rows("dout", p.dout, p.dout_strides, s.B, s.T, s.H);
  check.rows("out", p.out, p.out_strides, s.B, s.T, s.H), check.reads("lse", p.lse, Dtype::f32, s.B * s.H * s.T);
  check.rows("k", p.k, p.k_strides, s.B, s.S, s.Hkv), check.rows("v", p.v, p.v_strides, s.B, s.S, s.Hkv);
  check.fills("dq", p.dq, p.dtype, s.B * s.T * s.H * s.D);
  check.fills("dk", p.dk, p.dtype, s.B * s.S * s.Hkv * s.D), check.fills("dv", p.dv, p.dtype, s.B * s.S * s.Hkv * s.D);
  if (p.dtype == Dtype::bf16) launch_tile<bf16>(p, check, place);
  else launch_tile<fp16>(p, check, place);
}

}  // namespace megakern
