// Asynchronous kernels with a bug that a flag plants; 0 plants none. The emulator must catch each.
#include "device/ptx.cuh"
#include "device/shared.cuh"
#include "simt/tests/cases.h"

namespace megakern {
namespace {

enum PipelineBug : int {
  kDroppedWait = 1,      // consumers do not wait for a tile
  kWrongPhase,           // they wait with the other parity
  kMissingArrive,        // they do not give the stage back
  kOneArrive,            // one warp gives it back for both
  kNoEmptyWait,          // the producer does not wait for the stage
  kEarlyArrive,          // consumers give the stage back before they have read it
  kWrongSwizzle,         // they read rows as if there were no swizzle
  kBoxOutside,           // the last stage lies behind the end of shared memory
  kNoAlignment,          // the tiles are not aligned to 1024 bytes
  kWrongBytes,           // the producer expects fewer bytes than come
  kMoreBytes,            // ... more
  kNoInitFence,          // the barriers are used without mbar_init_fence
  kNoProxyFence,         // the copy engine may not see what the consumers have written
  kNoReadWait,           // the next tile is written over one that is being stored
  kNoTrailingBarrier,    // ... one thread has waited, and the others do not wait for it
  kNoEndWait,            // the thread leaves while its store reads
  kNoCommit,             // the store is in no group
  kExtraArrive,          // one arrival too many
  kLeftArrival,          // a warp arrives at a named barrier where nobody waits
};

constexpr int kRows = 16, kTileBytes = kRows * 128, kStages = 2, kConsumers = 2;

// y = 2 x, x and y (M, 64) bf16: a producer warp, a ring of two stages, two consumer warps, stores by TMA.
MK_KERNEL void __launch_bounds__(96) pipeline_kernel(const MK_GRID_CONSTANT TensorMap x, const MK_GRID_CONSTANT TensorMap y,
                                                     int tiles, int bug) {
#if MK_SM90A
  SharedMemory shared;
  MBarrier* full = shared.take<MBarrier>(kStages);
  MBarrier* empty = shared.take<MBarrier>(kStages);
  const int align = bug == kNoAlignment ? 16 : 1024;
  unsigned char* out = shared.take<unsigned char>(kTileBytes, align);
  unsigned char* ring = shared.take<unsigned char>(kStages * kTileBytes, align);
  if (bug == kBoxOutside) ring += kTileBytes;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbar_init(&full[s], 1, "full");
      mbar_init(&empty[s], kConsumers, "empty");
    }
    if (bug != kNoInitFence) mbar_init_fence();
  }
  sync_block();
  if (warp == 0) {
    if (lane != 0) return;
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages, phase = tile / kStages % 2;
      if (bug != kNoEmptyWait) mbar_wait(&empty[stage], phase ^ 1);
      mbar_expect(&full[stage], kTileBytes + (bug == kMoreBytes ? 16 : bug == kWrongBytes ? -16 : 0));
      tma_load_2d(ring + stage * kTileBytes, &x, &full[stage], 0, tile * kRows);
    }
    return;
  }
  const int thread = int(threadIdx.x) - kWarp, row = thread / 4;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, phase = tile / kStages % 2;
    if (bug != kDroppedWait) mbar_wait(&full[stage], bug == kWrongPhase ? phase ^ 1 : phase);
    if (bug == kEarlyArrive && lane == 0) mbar_arrive(&empty[stage]);
    unsigned v[2][4];
    for (int i = 0; i < 2; ++i) {
      const int piece = thread % 4 + 4 * i, at = bug == kWrongSwizzle ? piece : piece ^ (row % 8);
      memcpy(v[i], ring + stage * kTileBytes + row * 128 + at * 16, 16);
    }
    sync_warp();
    if (lane == 0 && bug != kMissingArrive && bug != kEarlyArrive) {
      if (bug != kOneArrive) mbar_arrive(&empty[stage]);
      else if (warp == 1) mbar_arrive(&empty[stage]), mbar_arrive(&empty[stage]);
      if (bug == kExtraArrive && warp == 1) mbar_arrive(&empty[stage]);
    }
    if (tile > 0) {
      if (thread == 0 && bug != kNoReadWait) tma_wait_read<0>();
      if (bug != kNoTrailingBarrier) barrier_sync<1>(64);
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {  // doubling raises the exponent, bits 7 to 14
        v[i][j] += 0x00800080u;
      }
      memcpy(out + row * 128 + ((thread % 4 + 4 * i) ^ (row % 8)) * 16, v[i], 16);
    }
    if (bug != kNoProxyFence) fence_async();
    barrier_sync<2>(64);
    if (thread == 0) {
      tma_store_2d(&y, out, 0, tile * kRows);
      if (bug != kNoCommit) tma_commit();
    }
  }
  if (thread == 0 && bug != kNoEndWait) tma_wait_read<0>();
  if (bug == kLeftArrival && warp == 1) barrier_arrive<3>(64);
#endif
}

enum WgmmaBug : int {
  kNoWait = 1,      // results are read before they are there
  kNoFence,         // registers were touched, and no wgmma_fence after it
  kOverwritten,     // an operand is written over before wgmma_wait
  kNoProxy,         // operands written by threads, and no fence_async
  kNoGroup,         // wgmma in no group
  kWrongSlab,       // the descriptor's distance of column slabs
  kWrongStep,       // steps along k as if B were K-major
  kNotNamed,        // wgmma_wait does not name the accumulators that it completes
  kOutside,         // the descriptor of B starts 16 KB too far
  kTooLate,         // an accumulator is read while the next group runs on it
  kAddNotNamed,     // wgmma_fence names other registers than the accumulators that are added to
  kRowsTooEarly,    // a warp writes over its rows of A once it has waited; the other three may not have
};

// b (16, 128) as an N-major operand.
MK_DEVICE void write_b(unsigned char* tile, const std::uint16_t* b, int t) {
  for (int i = t; i < 16 * 128; i += 128) {
    const int k = i / 128, n = i % 128;
    memcpy(tile + n / 64 * 2048 + k * 128 + ((n % 64 / 8) ^ (k % 8)) * 16 + n % 8 * 2, b + i, 2);
  }
}

// d (64, 128) = a (64, 16) b (16, 128), 16-bit bits. Threads write a (K-major) and b (N-major) to shared memory.
MK_KERNEL void __launch_bounds__(128) product_kernel(const std::uint16_t* a, const std::uint16_t* b, float* d, int bug) {
#if MK_SM90A
  SharedMemory shared;
  unsigned char* a_tile = shared.take<unsigned char>(64 * 128, 1024);
  unsigned char* b_tile = shared.take<unsigned char>(2 * 16 * 128, 1024);
  const int t = int(threadIdx.x);
  for (int i = t; i < 64 * 16; i += 128) {
    const int row = i / 16, k = i % 16;
    memcpy(a_tile + row * 128 + ((k / 8) ^ (row % 8)) * 16 + k % 8 * 2, a + i, 2);
  }
  write_b(b_tile, b, t);
  if (bug != kNoProxy) fence_async();
  sync_block();
  float sum[64];
  for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
  float other[64] = {};
  if (bug == kAddNotNamed) wgmma_fence(other);
  else if (bug != kNoFence) wgmma_fence(sum);
  const std::uint64_t a_part = matrix_descriptor(a_tile);
  const std::uint64_t b_part = matrix_descriptor(b_tile, (bug == kWrongStep ? 32 : 0) + (bug == kOutside ? 16384 : 0),
                                                 bug == kWrongSlab ? 1024 : 2048);
  wgmma_ss<bf16, 128, false, true>(sum, a_part, b_part, bug == kAddNotNamed);
  if (bug != kNoGroup) wgmma_commit();
  if (bug == kOverwritten) {
    a_tile[t * 64] ^= 0x40;
    fence_async();
    sync_block();
  }
  if (bug == kTooLate) {
    wgmma_ss<bf16, 128, false, true>(sum, a_part, b_part, true);
    wgmma_commit();
    wgmma_wait<1>(sum);
    for (int i = 0; i < 64; ++i) d[t * 64 + i] = sum[i];
  }
  if (bug == kNoWait || bug == kNoGroup) {
    for (int i = 0; i < 64; ++i) d[t * 64 + i] = sum[i];
  }
  if (bug == kNotNamed) wgmma_wait<0>();
  else wgmma_wait<0>(sum);
  if (bug == kRowsTooEarly) a_tile[t / 2 * 128 + ((t % 2) ^ (t / 2 % 8)) * 16] ^= 0x40;
  if (bug == kNoWait || bug == kTooLate) return;
  for (int i = 0; i < 64; ++i) d[t * 64 + i] = sum[i];
#endif
}

enum HeldBug : int {
  kChanged = 1,  // a register of A gets another value before wgmma_wait
  kNotFenced,    // wgmma_fence does not name the registers of A
};

// The same, with a from registers.
MK_KERNEL void __launch_bounds__(128) held_product_kernel(const std::uint16_t* a, const std::uint16_t* b, float* d, int bug) {
#if MK_SM90A
  SharedMemory shared;
  unsigned char* b_tile = shared.take<unsigned char>(2 * 16 * 128, 1024);
  const int t = int(threadIdx.x), lane = t % kWarp;
  write_b(b_tile, b, t);
  fence_async();
  sync_block();
  float sum[64];
  for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
  std::uint32_t fragment[1][4];
  for (int i = 0; i < 4; ++i) {
    memcpy(&fragment[0][i], a + (16 * (t / kWarp) + lane / 4 + 8 * (i % 2)) * 16 + 2 * (lane % 4) + 8 * (i / 2), 4);
  }
  if (bug == kNotFenced) wgmma_fence(sum);
  else wgmma_fence(sum, fragment);
  wgmma_rs<bf16, 128, true>(sum, fragment[0], matrix_descriptor(b_tile, 0, 2048), true);
  wgmma_commit();
  if (bug == kChanged) fragment[0][t % 4] ^= 0x40;
  wgmma_wait<0>(sum);
  for (int i = 0; i < 64; ++i) d[t * 64 + i] = sum[i];
#endif
}

enum HandedBug : int {
  kUnordered = 1,  // the second store does not wait for the first
  kReadOnly,       // the flag goes up when the store has been read, not when it is written
  kLaterBlock,     // the block that waits starts before the one that writes
};

// y (32,) = 1, then 2, by one block's copy engine; the other copies it to z once the flag is up.
MK_KERNEL void handed_kernel(float* y, float* z, int* flag, int bug) {
#if MK_SM90A
  SharedMemory shared;
  float* ones = shared.take<float>(32, 128);
  float* twos = shared.take<float>(32, 128);
  const int t = int(threadIdx.x), writer = bug == kLaterBlock ? 1 : 0;
  if (int(blockIdx.x) != writer) {
    if (t == 0) {
      while (atomic_add(flag, 0) == 0) yield_thread();
    }
    sync_warp();
    z[t] = y[t];
    return;
  }
  ones[t] = 1.0f, twos[t] = 2.0f;
  fence_async();
  sync_block();
  if (t == 0) {
    bulk_store(y, ones, 128);
    tma_commit();
    if (bug != kUnordered) tma_wait<0>();
    bulk_store(y, twos, 128);
    tma_commit();
    if (bug == kReadOnly) tma_wait_read<0>();
    else tma_wait<0>();
    fence_device();
    atomic_add(flag, 1);
  }
#endif
}

// y (2, 32) = x, by two copies with a barrier each. bug: all threads wait for the one of row bug - 1 alone.
MK_KERNEL void two_copies_kernel(const float* x, float* y, int bug) {
#if MK_SM90A
  SharedMemory shared;
  float* rows = shared.take<float>(2 * 32, 128);
  MBarrier* full = shared.take<MBarrier>(2);
  const int t = int(threadIdx.x);
  if (t == 0) {
    mbar_init(&full[0], 1, "first"), mbar_init(&full[1], 1, "second");
    mbar_init_fence();
    for (int i = 0; i < 2; ++i) {
      mbar_expect(&full[i], 128);
      bulk_load(rows + i * 32, x + i * 32, &full[i], 128);
    }
  }
  sync_block();
  if (bug != 2) mbar_wait(&full[0], 0);
  if (bug != 1) mbar_wait(&full[1], 0);
  for (int i = 0; i < 2; ++i) y[i * 32 + t] = rows[i * 32 + t];
  mbar_wait(&full[0], 0), mbar_wait(&full[1], 0);
#endif
}

enum SmallBug : int { kSmallNoWait = 1, kSmallNoBarrier, kSmallOneTooMany, kSmallNoEnd, kSmallReuse };

// y = x reversed in each tile of 4 threads floats; cp.async a tile ahead. 128 threads.
MK_KERNEL void small_copies_kernel(const float* x, float* y, int tiles, int bug) {
  SharedMemory shared;
  const int t = int(threadIdx.x), floats = 4 * int(blockDim.x);
  float* buffer = shared.take<float>(2 * floats);
  const auto fetch = [&](int tile) {
    if (tile < tiles) cp_async<16>(buffer + tile % 2 * floats + 4 * t, x + tile * floats + 4 * t);
    cp_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    if (bug == kSmallOneTooMany) cp_async_wait<2>();
    else if (bug != kSmallNoWait) cp_async_wait<1>();
    if (bug != kSmallNoBarrier) sync_block();
    for (int i = 0; i < 4; ++i) {
      y[tile * floats + 4 * t + i] = buffer[tile % 2 * floats + floats - 1 - (4 * t + i)];
    }
    if (bug != kSmallReuse) sync_block();  // before the buffer is written again
  }
  if (bug == kSmallNoWait || bug == kSmallOneTooMany) cp_async_wait<0>();
  if (bug == kSmallNoEnd) cp_async<16>(buffer + 4 * t, x + 4 * t);
}

enum ClusterBug : int { kPeerLeft = 1, kNoClusterSync, kWrongRank, kTwoArrivals };

// Each block of a cluster of two arrives at the other's barrier, and waits for its own. y (2,) = 1.
MK_KERNEL void meet_kernel(float* y, int bug) {
#if MK_SM90A
  SharedMemory shared;
  MBarrier* met = shared.take<MBarrier>(1);
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbar_init(met, 1, "met");
    mbar_init_fence();
  }
  if (bug != kNoClusterSync) cluster_arrive(), cluster_wait();
  if (bug == kTwoArrivals) cluster_arrive(), cluster_arrive();
  if (bug == kPeerLeft && rank == 1) return;
  sync_block();
  if (threadIdx.x == 0) {
    mbar_arrive_at(met, bug == kWrongRank ? rank : rank ^ 1);
    if (bug == kWrongRank) mbar_arrive_at(met, 2);
    mbar_wait(met, 0);
    y[rank] = 1.0f;
  }
  cluster_arrive();
  cluster_wait();
#endif
}

}  // namespace

MK_CASE(pipeline) {  // x, y (16 tiles, 64) bf16; tiles, bug
  const int tiles = a.number(0);
  const TensorMap x = matrix_map(a.tensor<void>(0), Dtype::bf16, tiles * kRows, 64, 64, kRows, 64, Swizzle::b128);
  const TensorMap y = matrix_map(a.tensor<void>(1), Dtype::bf16, tiles * kRows, 64, 64, kRows, 64, Swizzle::b128);
  MK_LAUNCH(pipeline_kernel, 1, 96, 2 * kStages * 16 + 1024 + (kStages + 1) * kTileBytes, a.place, x, y, tiles, a.number(1));
}

MK_CASE(product) {  // a, b, d; bug
  MK_LAUNCH(product_kernel, 1, 128, 1024 + 64 * 128 + 4096, a.place, a.tensor<std::uint16_t>(0), a.tensor<std::uint16_t>(1),
            a.tensor<float>(2), a.number(0));
}

MK_CASE(held_product) {  // a, b, d; bug
  MK_LAUNCH(held_product_kernel, 1, 128, 1024 + 4096, a.place, a.tensor<std::uint16_t>(0), a.tensor<std::uint16_t>(1),
            a.tensor<float>(2), a.number(0));
}

MK_CASE(handed) {  // y, z (32,), flag; bug
  MK_LAUNCH(handed_kernel, 2, 32, 3 * 128, a.place, a.tensor<float>(0), a.tensor<float>(1), a.tensor<int>(2), a.number(0));
}

MK_CASE(two_copies) {  // x, y (2, 32); bug
  MK_LAUNCH(two_copies_kernel, 1, 32, 2 * 128 + 128 + 16, a.place, a.tensor<float>(0), a.tensor<float>(1), a.number(0));
}

MK_CASE(small_copies) {  // x, y (tiles, 512); tiles, bug
  MK_LAUNCH(small_copies_kernel, 1, 128, 2 * 512 * 4, a.place, a.tensor<float>(0), a.tensor<float>(1), a.number(0), a.number(1));
}

MK_CASE(meet) {  // y; bug
  MK_LAUNCH_CLUSTER(meet_kernel, 2, 64, 16, 2, a.place, a.tensor<float>(0), a.number(0));
}

}  // namespace megakern
