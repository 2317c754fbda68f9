// One small kernel for each instruction of ptx.cuh and ptx_warp.cuh, which shows what it moves where. Tests hold it
// against a formula, in the emulator and on a GPU. All values are whole numbers that fp32 sums exactly.
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "simt/tests/cases.h"

namespace megakern {
namespace {

// Threads that start asynchronous work wait by spinning; this is the barrier that all cases use.
MK_DEVICE MBarrier* one_barrier(SharedMemory& shared, int arrivals = 1) {
  MBarrier* barrier = shared.take<MBarrier>(1);
  if (threadIdx.x == 0) {
    mbar_init(barrier, arrivals, "loaded");
    mbar_init_fence();
  }
  sync_block();
  return barrier;
}

MK_DEVICE void copy_out(unsigned char* to, const unsigned char* from, int bytes) {
  for (int i = int(threadIdx.x); i < bytes; i += int(blockDim.x)) to[i] = from[i];
}

// --- copies ---

struct Box {
  TensorMap map;
  int rank, bytes, at[4];
};

MK_DEVICE void load_box(void* to, const Box& box, const TensorMap* map, MBarrier* b) {
  const int* at = box.at;
  if (box.rank == 1) tma_load_1d(to, map, b, at[0]);
  if (box.rank == 2) tma_load_2d(to, map, b, at[0], at[1]);
  if (box.rank == 3) tma_load_3d(to, map, b, at[0], at[1], at[2]);
  if (box.rank == 4) tma_load_4d(to, map, b, at[0], at[1], at[2], at[3]);
}

// out (bytes,): shared memory as a box of x leaves it.
MK_KERNEL void tma_load_kernel(const MK_GRID_CONSTANT Box box, unsigned char* out) {
#if MK_SM90A
  SharedMemory shared;
  unsigned char* tile = shared.take<unsigned char>(box.bytes, 1024);
  MBarrier* loaded = one_barrier(shared);
  if (threadIdx.x == 0) {
    prefetch_map(&box.map);
    mbar_expect(loaded, box.bytes);
    load_box(tile, box, &box.map, loaded);
  }
  mbar_wait(loaded, 0);
  copy_out(out, tile, box.bytes);
#endif
}

// x (bytes,), in the order of shared memory, goes to a box of y: written, or added (rank 2).
MK_KERNEL void tma_store_kernel(const MK_GRID_CONSTANT Box box, const unsigned char* x, bool add) {
#if MK_SM90A
  SharedMemory shared;
  unsigned char* tile = shared.take<unsigned char>(box.bytes, 1024);
  copy_out(tile, x, box.bytes);
  fence_async();
  sync_block();
  if (threadIdx.x == 0) {
    const int* at = box.at;
    if (add) tma_add_2d(&box.map, tile, at[0], at[1]);
    else if (box.rank == 1) tma_store_1d(&box.map, tile, at[0]);
    else if (box.rank == 2) tma_store_2d(&box.map, tile, at[0], at[1]);
    else if (box.rank == 3) tma_store_3d(&box.map, tile, at[0], at[1], at[2]);
    else if (box.rank == 4) tma_store_4d(&box.map, tile, at[0], at[1], at[2], at[3]);
    tma_commit();
    tma_wait_read<0>();
    tma_wait<0>();
  }
#endif
}

// y = x, sum += x, by rows of bytes; fours += x, by threads.
MK_KERNEL void bulk_kernel(const float* x, float* y, float* sum, float* fours, int bytes) {
#if MK_SM90A
  SharedMemory shared;
  float* row = shared.take<float>(bytes / 4);
  MBarrier* loaded = one_barrier(shared);
  if (threadIdx.x == 0) {
    mbar_expect(loaded, bytes);
    bulk_load(row, x, loaded, bytes);
    mbar_wait(loaded, 0);
    bulk_store(y, row, bytes);
    bulk_add(sum, row, bytes);
    tma_commit();
    tma_wait_read<0>();
  }
  for (int i = 4 * int(threadIdx.x); i < bytes / 4; i += 4 * kWarp) add_four(fours + i, load<4>(x + i).values);
#endif
}

// Each thread copies Bytes, of which its number are read; two groups, the second waited for later.
template <int Bytes>
MK_KERNEL void cp_async_kernel(const unsigned char* x, unsigned char* y, bool by_barrier) {
#if MK_SM90A
  SharedMemory shared;
  const int t = int(threadIdx.x), threads = int(blockDim.x);
  unsigned char* tile = shared.take<unsigned char>(2 * threads * Bytes);
  MBarrier* loaded = one_barrier(shared, threads);
  for (int half = 0; half < 2; ++half) {
    const int at = (half * threads + t) * Bytes;
    if (half == 0) cp_async<Bytes>(tile + at, x + at);
    else cp_async<Bytes>(tile + at, x + at, t % (Bytes + 1));
    cp_async_commit();
  }
  if (by_barrier) {
    cp_async_arrive(loaded);
    mbar_wait(loaded, 0);
    cp_async_wait<0>();
  } else {
    cp_async_wait<1>();
    sync_block();
    copy_out(y, tile, threads * Bytes);
    cp_async_wait<0>();
    sync_block();
  }
  copy_out(y, tile, 2 * threads * Bytes);
#endif
}

// --- barriers ---

// seen (8,): what mbar_try_wait says, at each stage of a barrier's life.
MK_KERNEL void mbarrier_kernel(const float* x, int* seen) {
#if MK_SM90A
  SharedMemory shared;
  float* row = shared.take<float>(4);
  MBarrier* barrier = one_barrier(shared, 2);
  if (threadIdx.x == 0) {
    seen[0] = mbar_try_wait(barrier, 1);  // before the first phase
    mbar_arrive(barrier);
    seen[1] = mbar_try_wait(barrier, 1);
    mbar_arrive(barrier);
    seen[2] = mbar_try_wait(barrier, 0);  // complete
    seen[3] = mbar_try_wait(barrier, 0);
    mbar_expect(barrier, 16);
    mbar_arrive(barrier);
    seen[4] = mbar_try_wait(barrier, 0);  // still the same phase: its bytes are missing
    bulk_load(row, x, barrier, 16);
    mbar_wait(barrier, 1);
    seen[5] = int(row[3]);
    seen[6] = mbar_try_wait(barrier, 1);
    seen[7] = shared_address(barrier) % 16;
  }
#endif
}

// y[i] = x[i] + 1, handed from warp 0 to warp 1 and back by named barriers, `rounds` times.
MK_KERNEL void __launch_bounds__(256, 1) named_barriers_kernel(float* y, int rounds) {
#if MK_SM90A
  SharedMemory shared;
  float* row = shared.take<float>(kWarp);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  if (warp < 4) registers_shrink<24>();
  else registers_grow<40>();
  if (warp == 0) {
    row[lane] = float(lane);
    for (int i = 0; i < rounds; ++i) {
      barrier_arrive<1>(2 * kWarp);
      barrier_sync<2>(2 * kWarp);
      row[(lane + 1) % kWarp] += 1.0f;
      sync_warp();
    }
    y[lane] = row[lane];
  } else if (warp == 1) {
    for (int i = 0; i < rounds; ++i) {
      barrier_sync<1>(2 * kWarp);
      row[lane] += 1.0f;
      barrier_arrive<2>(2 * kWarp);
    }
  }
#endif
}

// A cluster of two: block r loads half r of x, by a map of 2 or of 4 dimensions, and gives it to both; then both add 100 and
// tell the other. y (2, 2 half).
// Each of 64 threads stores into the other block's shared memory, and loads from there: stored, loaded (2, 64).
MK_KERNEL void cluster_kernel(const MK_GRID_CONSTANT TensorMap map, const MK_GRID_CONSTANT TensorMap map_4d, float* y,
                              int* ranks, float* stored, float* loaded) {
#if MK_SM90A
  constexpr int half = 8 * 32;
  SharedMemory shared;
  float* tile = shared.take<float>(2 * half, 1024);
  MBarrier* full = shared.take<MBarrier>(1);
  MBarrier* done = shared.take<MBarrier>(1);
  float* place = shared.take<float>(64) + threadIdx.x;
  const int rank = cluster_rank(), at = int(blockIdx.x) * 64 + int(threadIdx.x);
  if (threadIdx.x == 0) {
    ranks[blockIdx.x] = rank;
    mbar_init(full, 1, "full");
    mbar_init(done, 2, "done");
    mbar_init_fence();
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) {
    mbar_expect(full, 2 * half * 4);
    if (rank == 0) tma_load_2d_multicast(tile, &map, full, 0, 0, 3);
    else tma_load_4d_multicast(tile + half, &map_4d, full, 0, 0, 2, 1, 3);
  }
  mbar_wait(full, 0);
  for (int i = int(threadIdx.x); i < 2 * half; i += int(blockDim.x)) y[blockIdx.x * 2 * half + i] = tile[i] + 100.0f;
  sync_block();
  if (threadIdx.x < 2) mbar_arrive_at(done, int(threadIdx.x));
  mbar_wait(done, 0);
  *cluster_shared(place, 1 - rank) = tile[threadIdx.x] + 1000.0f * float(rank);
  cluster_arrive();
  cluster_wait();
  stored[at] = *place;
  loaded[at] = *cluster_shared(tile + half * rank + threadIdx.x, 1 - rank);
  cluster_arrive();
  cluster_wait();
#endif
}

// --- a warp ---

// loaded (2, 32, 4): registers of ldmatrix, straight and transposed; stored (2, 4, 8, 8): what stmatrix makes of r
// (32, 4). x (4, 8, 8), 16 bits all.
MK_KERNEL void matrices_kernel(const std::uint16_t* x, const std::uint32_t* r, std::uint32_t* loaded,
                               std::uint16_t* stored) {
#if MK_SM90A
  SharedMemory shared;
  std::uint16_t* tile = shared.take<std::uint16_t>(256);
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += kWarp) tile[i] = x[i];
  sync_warp();
  std::uint32_t straight[4], transposed[4], mine[4];
  ldmatrix_x4(straight, tile + lane * 8);
  ldmatrix_x4_transposed(transposed, tile + lane * 8);
  for (int i = 0; i < 4; ++i) {
    loaded[lane * 4 + i] = straight[i];
    loaded[128 + lane * 4 + i] = transposed[i];
    mine[i] = r[lane * 4 + i];
  }
  for (int pass = 0; pass < 2; ++pass) {
    sync_warp();
    if (pass == 0) stmatrix_x4(tile + lane * 8, mine);
    else stmatrix_x4_transposed(tile + lane * 8, mine);
    sync_warp();
    for (int i = lane; i < 256; i += kWarp) stored[pass * 256 + i] = tile[i];
  }
#endif
}

// d (32, 4) += from registers a (32, 4), b (32, 2).
template <class T>
MK_KERNEL void mma_kernel(const std::uint32_t* a, const std::uint32_t* b, float* d) {
  const int lane = int(threadIdx.x);
  std::uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[lane * 4 + i], rd[i] = d[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[lane * 2 + i];
  mma_m16n8k16<T>(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = rd[i];
}

// out (10, threads): what each lane gets.
MK_KERNEL void lanes_kernel(const int* x, int* out, int* counters) {
  const int i = int(threadIdx.x), lane = i % kWarp, threads = int(blockDim.x);
  const int v = x[i];
  out[i] = shuffle(v, (lane * 7 + 3) % kWarp);
  out[threads + i] = shuffle_xor(v, 5);
  out[2 * threads + i] = shuffle_up(v, 3);
  out[3 * threads + i] = shuffle_down(v, 6);
  out[4 * threads + i] = int(ballot(v % 3 == 0));
  out[5 * threads + i] = any(v == x[0]);
  out[6 * threads + i] = all(v < 1000);
  out[7 * threads + i] = warp_reduce(v, Sum{});
  out[8 * threads + i] = warp_reduce(v, Max{});
  const double wide = shuffle(double(v) + 0.5, kWarp - 1 - lane);
  out[9 * threads + i] = int(2 * wide);
  atomic_add(counters, v);
  atomic_max(counters + 1, v);
}

// out (2, threads): the elected lane of each warp, twice.
MK_KERNEL void elect_kernel(int* out) {
#if MK_SM90A
  for (int turn = 0; turn < 2; ++turn) out[turn * int(blockDim.x) + int(threadIdx.x)] = elect_lane();
#endif
}

// y (5, threads N): x, as loads and stores of N neighbours move it, through caches, past them and through shared memory.
template <int N>
MK_KERNEL void vectors_kernel(const std::uint16_t* x, std::uint16_t* y) {
  SharedMemory shared;
  std::uint16_t* rows = shared.take<std::uint16_t>(int(blockDim.x) * N);
  const int at = int(threadIdx.x) * N, count = int(blockDim.x) * N;
  store(y + at, load<N>(x + at));
  store_once(y + count + at, load_once<N>(x + at));
  store_shared(rows + at, load<N>(x + at));
  sync_block();
  const int other = count - N - at;
  store(y + 2 * count + other, load<N>(rows + other));
  if constexpr (N == 8) {
    store(y + 3 * count + at, load_packed_once(x + at));
    store(y + 4 * count + at, packed(load<N>(x + at)));
  }
}

// y (7, count): approximations of x.
MK_KERNEL void math_kernel(const float* x, float* y, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  y[i] = exp2_approx(x[i]);
  y[count + i] = log2_approx(x[i]);
  y[2 * count + i] = rcp_approx(x[i]);
  y[3 * count + i] = rsqrt(x[i]);
  y[4 * count + i] = tanh_approx(x[i]);
  y[5 * count + i] = exp_approx(x[i]);
  y[6 * count + i] = log_approx(x[i]);
}

// numbers: dtype, swizzle, rank, for each dimension four, the bytes by which the map begins before `base`
Box box_of(const tests::Arguments& a, unsigned char* base) {
  Box box = {};
  const Dtype dtype = Dtype(a.number(0));
  box.rank = a.number(2);
  std::uint64_t sizes[4], strides[4];
  std::uint32_t sides[4];
  box.bytes = dtype == Dtype::f32 ? 4 : 2;
  for (int i = 0; i < box.rank; ++i) {
    sizes[i] = std::uint64_t(a.number(3 + 4 * i));
    if (i > 0) strides[i - 1] = std::uint64_t(a.number(4 + 4 * i));
    sides[i] = std::uint32_t(a.number(5 + 4 * i));
    box.at[i] = a.number(6 + 4 * i);
    box.bytes *= int(sides[i]);
  }
  base -= a.number(3 + 4 * box.rank);
  box.map = tensor_map(base, dtype, box.rank, sizes, strides, sides, a.number(1) ? Swizzle::b128 : Swizzle::none);
  return box;
}

}  // namespace

MK_CASE(tma_load) {  // x, out; of box_of
  const Box box = box_of(a, a.tensor<unsigned char>(0));
  MK_LAUNCH(tma_load_kernel, 1, 64, std::size_t(box.bytes) + 2048, a.place, box, a.tensor<unsigned char>(1));
}

MK_CASE(tma_store) {  // x, y; of box_of
  const Box box = box_of(a, a.tensor<unsigned char>(1));
  MK_LAUNCH(tma_store_kernel, 1, 64, std::size_t(box.bytes) + 2048, a.place, box, a.tensor<unsigned char>(0), false);
}

MK_CASE(tma_add) {  // x, y; of box_of
  const Box box = box_of(a, a.tensor<unsigned char>(1));
  MK_LAUNCH(tma_store_kernel, 1, 64, std::size_t(box.bytes) + 2048, a.place, box, a.tensor<unsigned char>(0), true);
}

MK_CASE(bulk) {  // x, y, sum, fours; bytes
  MK_LAUNCH(bulk_kernel, 1, 32, std::size_t(a.number(0)) + 16, a.place, a.tensor<float>(0), a.tensor<float>(1),
            a.tensor<float>(2), a.tensor<float>(3), a.number(0));
}

MK_CASE(cp_async) {  // x, y; bytes, threads, by barrier
  const auto run = [&](auto kernel, std::size_t bytes) {
    MK_LAUNCH(kernel, 1, unsigned(a.number(1)), 2 * bytes * std::size_t(a.number(1)) + 32, a.place,
              a.tensor<unsigned char>(0), a.tensor<unsigned char>(1), a.number(2) != 0);
  };
  if (a.number(0) == 4) run(&cp_async_kernel<4>, 4);
  if (a.number(0) == 8) run(&cp_async_kernel<8>, 8);
  if (a.number(0) == 16) run(&cp_async_kernel<16>, 16);
}

MK_CASE(mbarrier) {  // x, seen
  MK_LAUNCH(mbarrier_kernel, 1, 32, 64, a.place, a.tensor<float>(0), a.tensor<int>(1));
}

MK_CASE(named_barriers) {  // y; rounds
  MK_LAUNCH(named_barriers_kernel, 1, 256, 128, a.place, a.tensor<float>(0), a.number(0));
}

MK_CASE(cluster) {  // x (16, 32) fp32, y (2, 512), ranks (2,), stored and loaded (2, 64)
  const TensorMap map = matrix_map(a.tensor<void>(0), Dtype::f32, 16, 32, 32, 8, 32, Swizzle::none);
  const std::uint64_t sizes[] = {32, 8, 3, 2}, strides[] = {128, 256, 512};  // of a row, two rows, four
  const std::uint32_t box[] = {32, 8, 1, 1};
  const TensorMap map_4d = tensor_map(a.tensor<void>(0), Dtype::f32, 4, sizes, strides, box, Swizzle::none);
  MK_LAUNCH_CLUSTER(cluster_kernel, 2, 64, 2 * 1024 + 1024 + 32 + 256, 2, a.place, map, map_4d, a.tensor<float>(1),
                    a.tensor<int>(2), a.tensor<float>(3), a.tensor<float>(4));
}

MK_CASE(matrices) {  // x, r, loaded, stored
  MK_LAUNCH(matrices_kernel, 1, 32, 512, a.place, a.tensor<std::uint16_t>(0), a.tensor<std::uint32_t>(1),
            a.tensor<std::uint32_t>(2), a.tensor<std::uint16_t>(3));
}

MK_CASE(mma) {  // a, b, d; dtype
  if (Dtype(a.number(0)) == Dtype::bf16) {
    MK_LAUNCH(mma_kernel<bf16>, 1, 32, 0, a.place, a.tensor<std::uint32_t>(0), a.tensor<std::uint32_t>(1), a.tensor<float>(2));
  } else {
    MK_LAUNCH(mma_kernel<fp16>, 1, 32, 0, a.place, a.tensor<std::uint32_t>(0), a.tensor<std::uint32_t>(1), a.tensor<float>(2));
  }
}

MK_CASE(lanes) {  // x, out, counters; threads
  MK_LAUNCH(lanes_kernel, 1, unsigned(a.number(0)), 0, a.place, a.tensor<int>(0), a.tensor<int>(1), a.tensor<int>(2));
}

MK_CASE(elect) {  // out; threads
  MK_LAUNCH(elect_kernel, 1, unsigned(a.number(0)), 0, a.place, a.tensor<int>(0));
}

MK_CASE(vectors) {  // x, y of 2 bytes; N, threads
  const auto run = [&](auto n) {
    constexpr int N = decltype(n)::value;
    MK_LAUNCH(vectors_kernel<N>, 1, unsigned(a.number(1)), 2 * std::size_t(N) * std::size_t(a.number(1)), a.place,
              a.tensor<std::uint16_t>(0), a.tensor<std::uint16_t>(1));
  };
  if (a.number(0) == 1) run(std::integral_constant<int, 1>());
  if (a.number(0) == 2) run(std::integral_constant<int, 2>());
  if (a.number(0) == 4) run(std::integral_constant<int, 4>());
  if (a.number(0) == 8) run(std::integral_constant<int, 8>());
  if (a.number(0) == 16) run(std::integral_constant<int, 16>());
}

MK_CASE(approximations) {  // x, y; count
  MK_LAUNCH(math_kernel, unsigned(ceil_div(a.number(0), 256)), 256, 0, a.place, a.tensor<float>(0), a.tensor<float>(1),
            a.number(0));
}

}  // namespace megakern
