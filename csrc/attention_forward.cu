// Attention, forward: out = softmax(scale q k^T) v and its log sum exp, over the keys each query may see; the math is in
// megakern/ops/attention.py. Flash attention (arXiv 2205.14135) as on Hopper in arXiv 2407.08608.
//
// Writes: out and lse whole (=). Same bits at each run.
// Parallel: a block owns 128 queries of one head, a consumer warpgroup 64 of them. One thread of the third warpgroup
// fetches q, then k and v in tiles of 128 keys, last keys first, with TMA into two stages each. The scores of the next
// keys run on the tensor cores beside the softmax of these; the warpgroups issue their products in turn.
// Limits: sm_90a; bf16 and fp16; D 64 or 128; scale above 0; rows on multiples of 16 bytes.
#include <cmath>

#include "device/attention.cuh"
#include "device/checks.h"
#include "device/fragment.cuh"
#include "device/pipeline.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"

namespace megakern {

// What the kernel gets besides tensor maps.
struct AttentionPlan {
  float* lse;       // (B, H, T)
  AttentionMask mask;
  int T, H, group;
  int heads;        // B H
  int section;      // of them in flight at a time: their keys and values fit the L2 cache
  int tiles;        // of 128 queries, a head
  float scale;
};

template <int D>
struct AttentionTile {
  static constexpr int rows = 128, keys = 128, stages = 2;
  static constexpr int slabs = D / 64;  // of 64 columns: 128 bytes, the width of a swizzle
  static constexpr int q_slab = rows * 128, kv_slab = keys * 128;
  static constexpr int q_bytes = slabs * q_slab, kv_bytes = slabs * kv_slab;
  static constexpr int shared = 1024 + q_bytes + 2 * stages * kv_bytes + 16 * (1 + 4 * stages);
  static_assert(shared <= 227 * 1024, "shared memory of a block on sm_90");
};

// Where one block works: longest first, since under a causal mask the last queries see most keys.
struct AttentionPlace {
  int sample, head, row, first, end;  // first row of the tile; key tiles first to end - 1

  MK_DEVICE AttentionPlace(const AttentionPlan& p, int index, int rows, int keys) {
    const int whole = p.section * p.tiles, from = index / whole * p.section, within = index % whole;
    const int heads = min(p.heads - from, p.section), one = from + within % heads;
    sample = one / p.H, head = one % p.H;
    row = (p.tiles - 1 - within / heads) * rows;
    const int key = p.mask.first_key(row), behind = p.mask.behind_key(min(row + rows, p.T) - 1);
    first = key / keys;
    end = behind > key ? ceil_div(behind, keys) : first;
  }
};

// --- kernels ---

// The scores of 64 queries and 128 keys, and what they have made so far. Thread t of 128 holds rows t / 32 * 16 + t % 32 / 4
// and the eighth after it, in both of `s` and `o` the elements i with i / 2 % 2 = 0 and 1.
template <class T, int D>
struct AttentionRows {
  float s[64], o[D / 2];
  std::uint32_t p[8][4];  // exp of the scores, as operand A
  float most[2], sum[2];  // of the row so far; sum: of this thread's columns

  MK_DEVICE void start() {
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = 0;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0;
    most[0] = most[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // s = q k^T.
  MK_DEVICE void scores(const unsigned char* q, const unsigned char* k) {
    using Tile = AttentionTile<D>;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const std::uint64_t rows = matrix_descriptor(q, step / 4 * Tile::q_slab + step % 4 * 32);
      const std::uint64_t keys = matrix_descriptor(k, step / 4 * Tile::kv_slab + step % 4 * 32);
      wgmma_ss<T, 128, false, false>(s, rows, keys, step > 0);
    }
    wgmma_commit();
  }

  // o += p v.
  MK_DEVICE void weigh(const unsigned char* v) {
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      wgmma_rs<T, D, true>(o, p[step], matrix_descriptor(v, step * 2048, AttentionTile<D>::kv_slab), true);
    }
    wgmma_commit();
  }

  MK_DEVICE void scale_rows(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      o[4 * i] *= factor[0], o[4 * i + 1] *= factor[0];
      o[4 * i + 2] *= factor[1], o[4 * i + 3] *= factor[1];
    }
  }
};

template <class T, int D>
MK_KERNEL void __launch_bounds__(kPipelineThreads, 1)
    attention_forward_kernel(const MK_GRID_CONSTANT TensorMap q_map, const MK_GRID_CONSTANT TensorMap k_map,
                             const MK_GRID_CONSTANT TensorMap v_map, const MK_GRID_CONSTANT TensorMap out_map,
                             const MK_GRID_CONSTANT AttentionPlan plan) {
#if MK_SM90A
  using Tile = AttentionTile<D>;
  SharedMemory shared;
  unsigned char* q = shared.take<unsigned char>(Tile::q_bytes, 1024);
  unsigned char* k = shared.take<unsigned char>(Tile::stages * Tile::kv_bytes, 1024);
  unsigned char* v = shared.take<unsigned char>(Tile::stages * Tile::kv_bytes, 1024);
  MBarrier* q_full = shared.take<MBarrier>(1);
  MBarrier* k_full = shared.take<MBarrier>(Tile::stages);
  MBarrier* k_empty = shared.take<MBarrier>(Tile::stages);
  MBarrier* v_full = shared.take<MBarrier>(Tile::stages);
  MBarrier* v_empty = shared.take<MBarrier>(Tile::stages);

  const int warpgroup = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128;
  const AttentionPlace at(plan, int(blockIdx.x), Tile::rows, Tile::keys);
  if (threadIdx.x == 0) {
    mbar_init(q_full, 1, "q full");
    for (int s = 0; s < Tile::stages; ++s) {
      mbar_init(&k_full[s], 1, "k full"), mbar_init(&v_full[s], 1, "v full");
      mbar_init(&k_empty[s], 8, "k empty"), mbar_init(&v_empty[s], 8, "v empty");  // one arrival a warp
    }
    mbar_init_fence();
    prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map), prefetch_map(&out_map);
  }
  sync_block();

  Ring<Tile::stages> ring;
  if (warpgroup == 0) {
    registers_shrink<kProducerRegisters>();
    if (thread == 0 && at.first < at.end) {
      const auto fetch = [&](unsigned char* to, const TensorMap* map, MBarrier* full, int slab, int row, int head) {
        mbar_expect(full, Tile::slabs * slab);
#pragma unroll
        for (int i = 0; i < Tile::slabs; ++i) tma_load_4d(to + i * slab, map, full, 64 * i, row, head, at.sample);
      };
      fetch(q, &q_map, q_full, Tile::q_slab, at.row, at.head);
      const int head = at.head / plan.group;
#pragma unroll 1
      for (int j = at.end - 1; j >= at.first; --j, ring.advance()) {
        const int stage = ring.stage;
        mbar_wait(&k_empty[stage], ring.phase ^ 1);
        fetch(k + stage * Tile::kv_bytes, &k_map, &k_full[stage], Tile::kv_slab, j * Tile::keys, head);
        mbar_wait(&v_empty[stage], ring.phase ^ 1);
        fetch(v + stage * Tile::kv_bytes, &v_map, &v_full[stage], Tile::kv_slab, j * Tile::keys, head);
      }
    }
  } else {
    registers_grow<kConsumerRegisters>();
    const int consumer = warpgroup - 1, lane = thread % 32, row = at.row + consumer * 64;
    const int own = thread / 32 * 16 + lane / 4;  // row of s[0] among the 64
    unsigned char* q_own = q + consumer * 64 * 128;
    const float scale_log2 = plan.scale * kLog2E;
    const auto release = [&](MBarrier* empty) {
      if (lane == 0) mbar_arrive(empty);
    };
    // The other warpgroup's softmax runs beside this one's products. Consumer 0 begins; the last turn calls nobody.
    const auto take_turn = [&] { consumer_sync<3>(consumer, 256); };
    const auto give_turn = [&](bool last) {
      if (consumer == 0) barrier_arrive<4>(256);
      else if (!last) barrier_arrive<3>(256);
    };
    const int first_key[2] = {plan.mask.first_key(row + own), plan.mask.first_key(row + own + 8)};
    const int behind_key[2] = {plan.mask.behind_key(row + own), plan.mask.behind_key(row + own + 8)};
    const auto mask = [&](auto& rows, int j) {
      const int key = j * Tile::keys;
      if (key + Tile::keys > plan.mask.behind_key(row) || key < plan.mask.first_key(row + 63)) {
        mask_fragment(rows.s, first_key, behind_key, key + lane % 4 * 2);
      }
    };
    AttentionRows<T, D> rows;
    rows.start();
    float fade[2];
    if (at.first < at.end) {
      if (consumer == 1) barrier_arrive<3>(256);
      mbar_wait(q_full, 0);
      mbar_wait(&k_full[0], 0);
      take_turn();
      wgmma_fence(rows.s);
      rows.scores(q_own, k);
      give_turn(at.end - at.first == 1);
      wgmma_wait<0>(rows.s);
      release(&k_empty[0]);
      mask(rows, at.end - 1);
      soften_fragment(rows.s, scale_log2, rows.most, rows.sum, fade);
      pack_fragment<T>(rows.p, rows.s);
#pragma unroll 1
      for (int j = at.end - 2; j >= at.first; --j) {
        const int stage = ring.stage, phase = ring.phase;
        ring.advance();
        mbar_wait(&k_full[ring.stage], ring.phase);
        take_turn();
        wgmma_fence(rows.s);
        rows.scores(q_own, k + ring.stage * Tile::kv_bytes);
        mbar_wait(&v_full[stage], phase);
        wgmma_fence(rows.o, rows.p);
        rows.weigh(v + stage * Tile::kv_bytes);
        give_turn(j == at.first);
        wgmma_wait<1>(rows.s);
        release(&k_empty[ring.stage]);
        mask(rows, j);
        soften_fragment(rows.s, scale_log2, rows.most, rows.sum, fade);
        wgmma_wait<0>(rows.o, rows.s);
        release(&v_empty[stage]);
        rows.scale_rows(fade);
        pack_fragment<T>(rows.p, rows.s);
      }
      mbar_wait(&v_full[ring.stage], ring.phase);
      wgmma_fence(rows.o, rows.p);
      rows.weigh(v + ring.stage * Tile::kv_bytes);
      wgmma_wait<0>(rows.o);
      release(&v_empty[ring.stage]);
    }

    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = rows.sum[h];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      factor[h] = sum == 0 ? 0.0f : 1.0f / sum;
      const int t = row + own + 8 * h;
      if (lane % 4 == 0 && t < plan.T) {
        const std::int64_t line = std::int64_t(at.sample) * plan.H + at.head;
        plan.lse[line * plan.T + t] = sum == 0 ? -INFINITY : rows.most[h] * plan.scale + log2_approx(sum) * kLn2;
      }
    }
    rows.scale_rows(factor);
    consumer_sync<1>(consumer, 128);  // all products that read this part of q are done
#pragma unroll
    for (int i = 0; i < Tile::slabs; ++i) {
      write_fragment<T>(q_own + i * Tile::q_slab + thread / 32 * 16 * 128, rows.o + 32 * i, lane);
    }
    fence_async();
    consumer_sync<1>(consumer, 128);
    if (thread == 0 && row < plan.T) {
#pragma unroll
      for (int i = 0; i < Tile::slabs; ++i) {
        tma_store_4d(&out_map, q_own + i * Tile::q_slab, 64 * i, row, at.head, at.sample);
      }
      tma_commit();
      tma_wait<0>();
    }
  }
#endif
}

// --- launchers ---

template <class T, int D>
static void launch_attention(const AttentionForward& p, Place place) {
  using Tile = AttentionTile<D>;
  const AttentionSizes& s = p.sizes;
  const AttentionStrides dense = {s.T * s.H * s.D, s.H * s.D, s.D};
  const TensorMap q = head_map(p.q, p.dtype, s.B, s.T, s.H, s.D, p.q_strides, Tile::rows, false);
  const TensorMap k = head_map(p.k, p.dtype, s.B, s.S, s.Hkv, s.D, p.k_strides, Tile::keys, false);
  const TensorMap v = head_map(p.v, p.dtype, s.B, s.S, s.Hkv, s.D, p.v_strides, Tile::keys, false);
  const TensorMap out = head_map(p.out, p.dtype, s.B, s.T, s.H, s.D, dense, 64, false);
  const int tiles = int(ceil_div(s.T, int64_t(Tile::rows)));
  const AttentionMask mask = {int(s.S), int(s.S - s.T), window_side(p.left), window_side(p.right)};
  const AttentionPlan plan = {p.lse, mask, int(s.T), int(s.H), int(s.H / s.Hkv), int(s.B * s.H), int(p.section), tiles, p.scale};
  const Checks check("attention_forward");
  MK_LAUNCH((attention_forward_kernel<T, D>), dim3(check.blocks(s.B * s.H * tiles)), dim3(kPipelineThreads), Tile::shared,
            place, q, k, v, out, plan);
}

void attention_forward(const AttentionForward& p, Place place) {
  Checks check("attention_forward");
  const AttentionSizes& s = p.sizes;
  check.require(p.dtype == Dtype::bf16 || p.dtype == Dtype::f16,
                "dtype must be code 1 (bf16) or 2 (fp16), got " + std::to_string(int(p.dtype)));
  check.require(s.D == 64 || s.D == 128, "D must be 64 or 128, got " + std::to_string(s.D));
  constexpr int64_t most = 1 << 28;
  check.size("B", s.B, 1, most), check.size("T", s.T, 1, most), check.size("S", s.S, 1, most);
  check.size("H", s.H, 1, most), check.size("Hkv", s.Hkv, 1, s.H), check.size("section", p.section, 1, most);
  check.size("B H", s.B * s.H, 1, most);
  check.size("left", p.left, -1, most), check.size("right", p.right, -1, most);
  check.require(s.H % s.Hkv == 0, "Hkv must divide H");
  check.require(p.scale > 0 && std::isfinite(p.scale), "scale must be above 0 and finite");
  const auto reads = [&](const char* name, const void* x, const AttentionStrides& by, int64_t T, int64_t H) {
    check.require(vectors_fit(x, by.token * 2) && vectors_fit(x, by.head * 2) && vectors_fit(x, by.sample * 2),
                  std::string("the rows of ") + name + " must start on multiples of 16 bytes");
    check.require(by.token > 0 && by.head > 0 && by.sample > 0, std::string("the strides of ") + name + " must be above 0");
    const int64_t reach = (s.B - 1) * by.sample + (T - 1) * by.token + (H - 1) * by.head + s.D;
    check.reads(name, x, p.dtype, reach);
  };
  reads("q", p.q, p.q_strides, s.T, s.H);
  reads("k", p.k, p.k_strides, s.S, s.Hkv);
  reads("v", p.v, p.v_strides, s.S, s.Hkv);
  check.require(vectors_fit(p.out, 16), "out must start on a multiple of 16 bytes");
  check.writes("out", p.out, p.dtype, s.B * s.T * s.H * s.D);
  check.writes("lse", p.lse, Dtype::f32, s.B * s.H * s.T);
  if (p.dtype == Dtype::bf16 && s.D == 64) launch_attention<bf16, 64>(p, place);
  else if (p.dtype == Dtype::bf16) launch_attention<bf16, 128>(p, place);
  else if (s.D == 64) launch_attention<fp16, 64>(p, place);
  else launch_attention<fp16, 128>(p, place);
}

}  // namespace megakern
