// The matrix product behind linear.cu on sm_90a; what follows its sums is in device/epilogue.cuh.
//
//     out (M, N) (+)= f(A (M, K) B (K, N))        sums in fp32; f by the epilogue
//
// A block is three warpgroups. One thread of the first, the producer, fetches tiles of A and B with TMA into a ring of
// stages; the other two, the consumers, multiply them with wgmma. Blocks are persistent: block i computes tiles i,
// i + P, ... and the producer runs ahead into the next tile while consumers write the last one. Two blocks of a cluster
// compute tiles below each other and share B: each fetches half and TMA writes it to both. The tiles of the last round may
// be split along K (`complete`).
// csrc/README.md has a picture.
#pragma once

#include "device/epilogue.cuh"
#include "device/pipeline.cuh"
#include "device/shared.cuh"
#include "device/vector.cuh"

namespace megakern {

// What the kernel gets besides tensor maps.
struct Product : Follows {
  int K;
  int band;        // cluster rows of tiles that are walked column by column
  int head_start;  // steps that consumer 0 of a cooperative tile is ahead of consumer 1, for their epilogues to take turns
  float* sums;     // (splits, 4, M), or null: sums of A's rows over K, in so many parts; zeros if there are splits
  int whole, splits;  // tiles from number `whole` on are computed in `splits` parts along K
  float* parts;       // their sums, and below how many parts of each warp's rows are there
  int* arrivals;
};

// Sizes of one kernel. Cooperative: both consumers compute halves of the same tile. Ping-pong: they take tiles in turn,
// and one's epilogue runs beside the other's products.
template <int Rows, int Cols, int Stages, int Cluster, bool PingPong>
struct ProductTile {
  static constexpr int rows = Rows, cols = Cols, stages = Stages, cluster = Cluster;
  static constexpr bool ping_pong = PingPong;
  static constexpr int depth = 64;                                  // of K a stage: 128 bytes, the width of a swizzle
  static constexpr int fragments = Rows / 64 / (PingPong ? 1 : 2);  // of 64 rows, for each consumer
  static constexpr int readers = PingPong ? 1 : 2;                  // consumers of a stage
  static constexpr int a_bytes = Rows * depth * 2;
  static constexpr int b_bytes = round_up(Cols, 64) * depth * 2;  // MN-major B comes in tiles of 64 columns
  static constexpr int chunk_bytes = 16 * 128;  // 16 rows of 128 bytes on their way to global memory
  static constexpr int sums = fragments * Cols / 2;  // of a consumer's thread
  static constexpr int chunks = sums > 160 ? 4 : 2;  // for each of 8 consumer warps; 4: those of all outputs at once
  static constexpr int area = Rows * Cols;
  // Where things lie behind one aligned address: an address each would be computed anew in each step.
  static constexpr int b = Stages * a_bytes, pieces = b + Stages * b_bytes, barriers = pieces + 8 * chunks * chunk_bytes;
  static constexpr int bytes = barriers + 2 * Stages * 8, shared = 1024 + round_up(bytes, 16);
  static_assert(shared <= 227 * 1024, "shared memory of a block on sm_90");
  static_assert(fragments * Cols <= 384, "accumulators of a consumer thread: half of this");
};

// What is split along K. In clusters, tiles of 128 x 256 and the longer epilogues, registers ran out: by 4 to 35 a thread.
template <class Tile, Layout L>
inline constexpr bool kSplits = Tile::ping_pong && Tile::cluster == 1 && Tile::sums <= 128 && (L == Layout::nt || L == Layout::tn);

// What a block (or cluster) computes at a time: a tile, or a part of it along K.
struct Task {
  int row, col;     // first of its tile
  int step, steps;  // first, and how many, of `depth` along K
  int tile, part;   // of a tile in parts: which of those tiles; which part. Else part is -1
};

// Tiles go in bands of `band` cluster rows, walked column by column, so that the tiles that run at one time share rows of
// A and columns of B in the L2 cache.
template <class Tile, Layout L>
struct Schedule {
  static constexpr int cols = L == Layout::gated ? Tile::cols / 2 : Tile::cols;  // of out

  int down, across, band, steps, whole, splits, count;

  MK_DEVICE explicit Schedule(const Product& p)
      : down(ceil_div(p.M, Tile::rows * Tile::cluster)), across(ceil_div(p.N, cols)), band(p.band),
        steps(ceil_div(p.K, Tile::depth)), whole(p.whole), splits(p.splits),
        count(whole + (down * across - whole) * splits) {}

  // Steps of K before part `part` of `splits`: of at most 2^25 steps (K < 2^31), and 32 parts.
  MK_DEVICE int before(int part) const { return steps * part / splits; }

  MK_DEVICE int steps_of(int index) const {
    if (!kSplits<Tile, L> || index < whole) return steps;
    const int part = (index - whole) % splits;
    return before(part + 1) - before(part);
  }

  MK_DEVICE Task task(int index, int rank) const {
    Task t = {0, 0, 0, steps, 0, -1};
    if (kSplits<Tile, L> && index >= whole) {
      t.tile = (index - whole) / splits, t.part = (index - whole) % splits;
      t.step = before(t.part), t.steps = before(t.part + 1) - t.step;
      index = whole + t.tile;
    }
    const int of_band = band * across, first = index / of_band * band, within = index % of_band;
    const int height = min(down - first, band);
    t.row = ((first + within % height) * Tile::cluster + rank) * Tile::rows;
    t.col = within / height * cols;
    return t;
  }
};

// --- producer ---

template <class Tile, Layout L>
MK_DEVICE void fetch(unsigned char* a, unsigned char* b, MBarrier* full, const TensorMap* a_map, const TensorMap* b_map,
                     const TensorMap* up_map, int row, int col, int k, int rank) {
  constexpr bool AMajorM = L == Layout::tn, BMajorN = L == Layout::nn || L == Layout::tn;
  constexpr int both = (1 << Tile::cluster) - 1;
  mbar_expect(full, Tile::a_bytes + (BMajorN ? Tile::b_bytes : Tile::cols * Tile::depth * 2));
  if constexpr (AMajorM) {
#pragma unroll
    for (int m = 0; m < Tile::rows; m += 64) tma_load_2d(a + m * 128, a_map, full, row + m, k);
  } else {
    tma_load_2d(a, a_map, full, k, row);
  }
  if constexpr (BMajorN) {  // tiles of 64 columns; each block of the cluster fetches its half of their k rows
    constexpr int half = Tile::depth / Tile::cluster;
#pragma unroll
    for (int n = 0; n < Tile::cols; n += 64) {
      unsigned char* to = b + n * 128 + rank * half * 128;
      if constexpr (Tile::cluster == 1) tma_load_2d(to, b_map, full, col + n, k);
      else tma_load_2d_multicast(to, b_map, full, col + n, k + rank * half, both);
    }
  } else if constexpr (L == Layout::gated) {  // the sums of both products lie in the same threads, side by side
    static_assert(Tile::cluster == 1);
    tma_load_2d(b, b_map, full, k, col);
    tma_load_2d(b + Tile::b_bytes / 2, up_map, full, k, col);
  } else {
    constexpr int half = Tile::cols / Tile::cluster;
    if constexpr (Tile::cluster == 1) tma_load_2d(b, b_map, full, k, col);
    else tma_load_2d_multicast(b + rank * half * 128, b_map, full, k, col + rank * half, both);
  }
}

// Sums over K of the rows of an MN-major A, for a consumer's rows: the bias gradient beside dW = dy^T x, of the very tiles
// of dy that the tensor cores read. Thread t adds 8 columns of memory, number t % 8 of 64, of rows t / 8 + 16 i of a stage.
template <class T, class Tile>
struct RowSums {
  float total[Tile::fragments][8] = {};

  // `a`: the consumer's slabs of 64 rows of A in a stage. It is free for the next copy when all lanes are done.
  MK_DEVICE void add(const unsigned char* a, int thread) {
#pragma unroll
    for (int m = 0; m < Tile::fragments; ++m) {
#pragma unroll
      for (int i = 0; i < Tile::depth / 16; ++i) {
        const int k = thread / 8 + 16 * i, piece = (thread ^ k) % 8;
        const auto values = to_float(load<8>(reinterpret_cast<const T*>(a + m * 8192 + k * 128 + piece * 16)));
#pragma unroll
        for (int j = 0; j < 8; ++j) total[m][j] += values[j];
      }
    }
    sync_warp();
  }

  // Those of rows `row` on to `to`, a row of M for this warp.
  MK_DEVICE void write(float* to, int row, int M, int lane) {
#pragma unroll
    for (int m = 0; m < Tile::fragments; ++m) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        total[m][j] += shuffle_xor(total[m][j], 8);
        total[m][j] += shuffle_xor(total[m][j], 16);
      }
      const int first = row + 64 * m + 8 * lane;
      if (lane < 8 && first < M) {
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
          store(to + first + j, Vector<float, 4>{{total[m][j], total[m][j + 1], total[m][j + 2], total[m][j + 3]}});
        }
      }
    }
  }
};

// A warp's sums over one part of K go to memory, to `parts` of its rows of a tile. -> whether it completes the parts: then
// its epilogue adds them in the order of K, so the bits do not depend on who comes last, and nobody waits for anybody. What
// follows the product follows there as for a whole tile; a second kernel would have to repeat all of it.
template <class Tile>
MK_DEVICE bool complete(const float (&d)[Tile::fragments][Tile::cols / 2], float* parts, const Product& p, const Task& task,
                        int warp, int lane) {
  static_assert(Tile::cluster == 1);
  float* to = parts + task.part * Tile::area;
#pragma unroll
  for (int m = 0; m < Tile::fragments; ++m) {
#pragma unroll
    for (int i = 0; i < Tile::cols / 2; ++i) to[(m * Tile::cols / 2 + i) * 32] = d[m][i];
  }
  fence_device();
  sync_warp();
  int before = 0;
  if (lane == 0) before = atomic_add(p.arrivals + task.tile * 4 + warp, 1);
  // A vote: after a branch on another value the compiler would take the warp for divided, and keep the main loop's
  // addresses and descriptors in each thread.
  const bool last = any(before == p.splits - 1);
  fence_device();
  return last;
}

// --- the kernel ---

// T of a and b: bf16 or fp16. Out: T or float; float with Layout::tn alone. For the grid: whole clusters.
template <class T, class Out, Layout L, class Tile>
MK_KERNEL void __launch_bounds__(kPipelineThreads, 1)
    product_kernel(const MK_GRID_CONSTANT TensorMap a_map, const MK_GRID_CONSTANT TensorMap b_map,
                   const MK_GRID_CONSTANT TensorMap up_map, const MK_GRID_CONSTANT TensorMap out_map,
                   const MK_GRID_CONSTANT TensorMap second_map, const MK_GRID_CONSTANT TensorMap third_map,
                   const MK_GRID_CONSTANT Product p) {
#if MK_SM90A
  constexpr bool a_major_m = L == Layout::tn, b_major_n = L == Layout::nn || L == Layout::tn;
  constexpr int stages = Tile::stages, fragments = Tile::fragments;
  SharedMemory shared;
  unsigned char* const a_tiles = shared.take<unsigned char>(Tile::bytes, 1024);
  unsigned char *b_tiles = a_tiles + Tile::b, *chunks = a_tiles + Tile::pieces;
  MBarrier *full = reinterpret_cast<MBarrier*>(a_tiles + Tile::barriers), *empty = full + stages;

  const int warpgroup = warpgroup_index(), thread = int(threadIdx.x) % 128;
  const int rank = Tile::cluster == 1 ? 0 : cluster_rank();
  const int first = int(blockIdx.x) / Tile::cluster, programs = int(gridDim.x) / Tile::cluster;
  const Schedule<Tile, L> schedule(p);

  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      mbar_init(&full[s], 1, "full");
      mbar_init(&empty[s], Tile::readers * 4 * Tile::cluster, "empty");  // one arrival a warp
    }
    mbar_init_fence();
  }
  if (threadIdx.x == kWarp) {  // the first copy would wait for its map; beside the barriers, not behind them
    prefetch_map(&a_map), prefetch_map(&b_map), prefetch_map(&out_map);
    if constexpr (L == Layout::gated) prefetch_map(&up_map);
  }
  if constexpr (Tile::cluster == 1) sync_block();
  else cluster_arrive(), cluster_wait();

  Ring<stages> ring;
  if (warpgroup == 0) {
    registers_shrink<kProducerRegisters>();
    if (thread < kWarp && elect_lane()) {
      for (int index = first; index < schedule.count; index += programs) {
        const Task task = schedule.task(index, rank);
#pragma unroll 1
        for (int step = task.step; step < task.step + task.steps; ++step, ring.advance()) {
          mbar_wait(&empty[ring.stage], ring.phase ^ 1);
          fetch<Tile, L>(a_tiles + ring.stage * Tile::a_bytes, b_tiles + ring.stage * Tile::b_bytes, &full[ring.stage],
                         &a_map, &b_map, &up_map, task.row, task.col, step * Tile::depth, rank);
        }
      }
    }
  } else {
    registers_grow<kConsumerRegisters>();
    const int consumer = warpgroup - 1;
    const int top = Tile::ping_pong ? 0 : consumer * fragments * 64;  // first row in the tile
    const int warp = shuffle(thread / 32, 0), lane = thread % 32;
    Epilogue<T, Out, L, Tile> epilogue{
        p, &out_map, &second_map, &third_map, chunks + (consumer * 4 + warp) * Tile::chunks * Tile::chunk_bytes, warp, lane};
    const auto release = [&](int stage) {
      if (lane < Tile::cluster) {
        if constexpr (Tile::cluster == 1) mbar_arrive(&empty[stage]);
        else mbar_arrive_at(&empty[stage], lane);
      }
    };
    // 64 rows of K-major A and a slab of MN-major A are both 8 KB. What a shuffle made is kept, not computed in each step.
    const std::uint64_t a_first = shuffle(matrix_descriptor(a_tiles, top * 128, 64 * 128), 0);
    const std::uint64_t b_first = shuffle(matrix_descriptor(b_tiles, 0, 64 * 128), 0);
    const bool ahead = !Tile::ping_pong && p.head_start > 0 && consumer == 0;
    if (!Tile::ping_pong && p.head_start > 0 && consumer == 1) barrier_sync<1>(256);
    int turn = 0;
    for (int index = first; index < schedule.count; index += programs, turn ^= 1) {
      if (Tile::ping_pong && turn != consumer) {
        ring.advance(schedule.steps_of(index));
        continue;
      }
      // In turn: a phase of `full` is told from the one two before only by who has already waited for the one between.
      if (Tile::ping_pong && index >= programs) {
        if (consumer == 0) barrier_sync<1>(256);
        else barrier_sync<2>(256);
      }
      const Task task = schedule.task(index, rank);
      const int row = task.row + top, col = task.col, steps = task.steps;
      float d[fragments][Tile::cols / 2];  // of this task alone: outside of the loop they would be held to the next wgmma
      RowSums<T, Tile> sums;
      const bool summing = a_major_m && p.sums != nullptr && col == 0;
      epilogue.load_bias(col);
      int previous = -1;
#pragma unroll 1
      for (int step = 0; step < steps; ++step, ring.advance()) {
        mbar_wait(&full[ring.stage], ring.phase);
        const std::uint64_t a = descriptor_behind(a_first, ring.stage * Tile::a_bytes);
        const std::uint64_t b = descriptor_behind(b_first, ring.stage * Tile::b_bytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Tile::depth / 16; ++k) {
          const std::uint64_t b_part = descriptor_behind(b, b_major_n ? k * 2048 : k * 32);
#pragma unroll
          for (int m = 0; m < fragments; ++m) {
            const std::uint64_t a_part = descriptor_behind(a, 64 * m * 128 + (a_major_m ? k * 2048 : k * 32));
            wgmma_ss<T, Tile::cols, a_major_m, b_major_n>(d[m], a_part, b_part, step > 0 || k > 0);
          }
        }
        wgmma_commit();
        if (a_major_m && summing) sums.add(a_tiles + ring.stage * Tile::a_bytes + top * 128, thread);  // while the products run
        if (ahead && index == first && step == min(p.head_start, steps) - 1) barrier_arrive<1>(256);
        wgmma_wait<1>();  // the step before: its stage is free
        if (previous >= 0) release(previous);
        previous = ring.stage;
      }
      if (Tile::ping_pong && index + programs < schedule.count) {
        if (consumer == 0) barrier_arrive<2>(256);
        else barrier_arrive<1>(256);
      }
      epilogue.load_ahead(row, col);
      if constexpr (fragments == 1) wgmma_wait<0>(d[0]);
      else wgmma_wait<0>(d[0], d[1]);
      release(previous);

      if (a_major_m && summing) sums.write(p.sums + std::int64_t(4 * max(task.part, 0) + warp) * p.M, row, p.M, lane);
      if constexpr (Tile::sums > 160) opaque(epilogue.lane);  // or addresses of each lane are held through the main loop
      if (!kSplits<Tile, L> || task.part < 0) {
#pragma unroll
        for (int m = 0; m < fragments; ++m) {
          epilogue.fragment(HeldSums<Tile::cols / 2>{d[m]}, row + 64 * m, col);
        }
      } else if constexpr (kSplits<Tile, L>) {  // a second copy of the epilogue: in one for both, registers run out
        float* parts = p.parts + std::int64_t(task.tile) * p.splits * Tile::area + warp * 32 * Tile::sums + lane;
        if (complete<Tile>(d, parts, p, task, warp, lane)) {
#pragma unroll 1
          for (int m = 0; m < fragments; ++m) {
            epilogue.fragment(StoredSums<Tile::area>{parts + m * 16 * Tile::cols, p.splits}, row + 64 * m, col);
          }
        }
      }
    }
    if (elect_lane()) tma_wait_read<0>();  // that they have arrived is sure when the grid is done
  }
  // No block leaves while another may still write to its shared memory or arrive at its barriers.
  if constexpr (Tile::cluster > 1) cluster_arrive(), cluster_wait();
#endif
}

}  // namespace megakern
