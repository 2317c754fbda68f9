// One function an instruction: barriers in shared memory (mbarrier), the copy engine (TMA), the tensor cores of sm_90a
// (wgmma), clusters. Inline assembly is here and nowhere else; under simt the same names are C++ that keeps the rules.
//
// Shared memory is named by plain pointers. An instruction whose name says `sync` in PTX wants all 32 lanes (wgmma: all
// 128 threads of four neighbouring warps, the first a multiple of 4).
#pragma once

#include "device/platform.cuh"
#include "device/tensor_map.cuh"

// Device code with wgmma and setmaxnreg exists for sm_90a alone: kernels that use them have empty bodies elsewhere.
#if defined(MEGAKERN_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MK_SM90A 1
#else
#define MK_SM90A 0
#endif

#if defined(MEGAKERN_SIMT)
#include "simt/ptx.h"
#else

#include "device/ptx_warp.cuh"

namespace megakern {

// --- mbarrier: 64 bits in shared memory that count arrivals and bytes, and flip their phase when both are complete ---

struct alignas(8) MBarrier {
  std::uint64_t bits;
};

// One thread, before any other use; then mbar_init_fence and a barrier of the block or cluster. `name`: for messages.
MK_DEVICE void mbar_init(MBarrier* b, int arrivals, const char* name) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Makes the initialisation visible to the copy engine and to the cluster.
MK_DEVICE void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

MK_DEVICE void mbar_arrive(MBarrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives at the barrier in the same place of block `rank` of the cluster, which may be this one. Ordered after what the
// thread's copies and wgmma have done; `.release.cluster`, for ordinary writes, is a fence to the L2 cache and took a
// third of a matrix product's time on an H200.
MK_DEVICE void mbar_arrive_at(MBarrier* b, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(b)), "r"(rank)
      : "memory");
}
// Arrives, and makes the phase wait for that many bytes of copies.
MK_DEVICE void mbar_expect(MBarrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Has the phase of this parity completed? The first phase has parity 0; before it, parity 1 counts as complete.
MK_DEVICE bool mbar_try_wait(MBarrier* b, int parity) {
  std::uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
  return done != 0;
}
MK_DEVICE void mbar_wait(MBarrier* b, int parity) {
#if defined(MEGAKERN_SPINS)  // for checks of new kernels: one that would hang ends, with wrong results
  for (int i = 0; i < MEGAKERN_SPINS && !mbar_try_wait(b, parity); ++i) {
  }
#else
  while (!mbar_try_wait(b, parity)) {
  }
#endif
}

// One of the barrier's arrivals comes when all copies that this thread has started by cp_async are complete.
MK_DEVICE void cp_async_arrive(MBarrier* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}

// What this thread has written to shared memory becomes visible to the copy engine and the tensor cores, once a barrier
// has told the thread that starts them.
MK_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// One lane of the warp, the same at each call; all 32 call. The compiler knows that it is one: for a lane that a comparison
// finds it writes a loop over the lanes around each copy, which waits until the copy engine has read its registers.
MK_DEVICE bool elect_lane() {
  std::uint32_t chosen;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(chosen));
  return chosen != 0;
}

// --- TMA: boxes between global and shared memory. One thread issues; coordinates in elements, innermost first ---

MK_DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

#define MK_TMA_LOAD "cp.async.bulk.tensor."
#define MK_TMA_TO_SHARED ".shared::cluster.global.mbarrier::complete_tx::bytes"

MK_DEVICE void tma_load_1d(void* to, const TensorMap* map, MBarrier* b, int x) {
  asm volatile(MK_TMA_LOAD "1d" MK_TMA_TO_SHARED " [%0], [%1, {%3}], [%2];" ::"r"(shared_address(to)), "l"(map),
               "r"(shared_address(b)), "r"(x)
               : "memory");
}
MK_DEVICE void tma_load_2d(void* to, const TensorMap* map, MBarrier* b, int x, int y) {
  asm volatile(MK_TMA_LOAD "2d" MK_TMA_TO_SHARED " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)), "l"(map),
               "r"(shared_address(b)), "r"(x), "r"(y)
               : "memory");
}
MK_DEVICE void tma_load_3d(void* to, const TensorMap* map, MBarrier* b, int x, int y, int z) {
  asm volatile(MK_TMA_LOAD "3d" MK_TMA_TO_SHARED " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)), "l"(map),
               "r"(shared_address(b)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
MK_DEVICE void tma_load_4d(void* to, const TensorMap* map, MBarrier* b, int x, int y, int z, int w) {
  asm volatile(MK_TMA_LOAD "4d" MK_TMA_TO_SHARED " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
// The box goes to the same place in each block of the cluster whose bit is set in `blocks`, its bytes count there.
MK_DEVICE void tma_load_2d_multicast(void* to, const TensorMap* map, MBarrier* b, int x, int y, int blocks) {
  asm volatile(MK_TMA_LOAD "2d" MK_TMA_TO_SHARED ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "h"(static_cast<unsigned short>(blocks))
               : "memory");
}
MK_DEVICE void tma_load_4d_multicast(void* to, const TensorMap* map, MBarrier* b, int x, int y, int z, int w, int blocks) {
  asm volatile(MK_TMA_LOAD "4d" MK_TMA_TO_SHARED ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w),
               "h"(static_cast<unsigned short>(blocks))
               : "memory");
}
// `bytes` side by side; addresses and size are multiples of 16.
MK_DEVICE void bulk_load(void* to, const void* from, MBarrier* b, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(shared_address(b)), "r"(bytes)
               : "memory");
}

// Stores belong to the thread's current group until tma_commit closes it.
MK_DEVICE void tma_store_1d(const TensorMap* map, const void* from, int x) {
  asm volatile(MK_TMA_LOAD "1d.global.shared::cta.bulk_group [%0, {%2}], [%1];" ::"l"(map), "r"(shared_address(from)),
               "r"(x)
               : "memory");
}
MK_DEVICE void tma_store_2d(const TensorMap* map, const void* from, int x, int y) {
  asm volatile(MK_TMA_LOAD "2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y)
               : "memory");
}
MK_DEVICE void tma_store_3d(const TensorMap* map, const void* from, int x, int y, int z) {
  asm volatile(MK_TMA_LOAD "3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
MK_DEVICE void tma_store_4d(const TensorMap* map, const void* from, int x, int y, int z, int w) {
  asm volatile(MK_TMA_LOAD "4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
// Adds the box to global memory, element by element, each addition in one piece.
MK_DEVICE void tma_add_2d(const TensorMap* map, const void* from, int x, int y) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y)
               : "memory");
}
MK_DEVICE void bulk_store(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
MK_DEVICE void bulk_add(float* to, const float* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
// By a thread, from its registers: four floats, `to` on a multiple of 16 bytes, each addition in one piece. In any order.
MK_DEVICE void add_four(float* to, const float (&v)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}
MK_DEVICE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most `Pending` of the thread's groups have yet to read shared memory.
template <int Pending>
MK_DEVICE void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// Until at most `Pending` of the thread's groups have yet to write global memory.
template <int Pending>
MK_DEVICE void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}
#undef MK_TMA_LOAD
#undef MK_TMA_TO_SHARED

// --- named barriers, clusters, registers ---

// Barrier `Id` (1 to 15; 0 is sync_block) of the block for `threads` threads, whole warps; arrive does not wait.
template <int Id>
MK_DEVICE void barrier_sync(int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}
template <int Id>
MK_DEVICE void barrier_arrive(int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
MK_DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
MK_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
MK_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same place in the shared memory of block `rank` of the cluster, for loads and stores. That block must have started
// (a barrier of the cluster tells) and must not have ended.
template <class T>
MK_DEVICE T* cluster_shared(T* place, int rank) {
  std::uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
  return reinterpret_cast<T*>(there);
}
#else  // each block is a cluster of its own
MK_DEVICE int cluster_rank() { return 0; }
MK_DEVICE void cluster_arrive() {}
MK_DEVICE void cluster_wait() { __syncthreads(); }
template <class T>
MK_DEVICE T* cluster_shared(T* place, int) {
  return place;
}
#endif

// A warpgroup gives registers back to the block or takes more, to `Count` a thread (24 to 240 in steps of 8).
template <int Count>
MK_DEVICE void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
MK_DEVICE void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// --- wgmma: D (64, N) (+)= A (64, 16) B (16, N) by a warpgroup, sums in fp32 ---
//
// D: thread t holds d[i] = D[16 (t / 32 % 4) + t % 32 / 4 + 8 (i / 2 % 2)][8 (i / 4) + 2 (t % 4) + i % 2].
// Operands in shared memory are tiles of rows of 128 bytes, Swizzle::b128, at multiples of 1024 bytes; the tile of
// "K-major" A has a row for each m with 64 values along k; that of "MN-major" A has a row for each k with 64 along m.

// Of a tile, or of the part that starts `offset` bytes into it. slab: MN-major alone, bytes from one tile of 64 columns
// (64 k rows, say) to the next. A step of 16 along k: K-major 32 bytes, MN-major 2048.
MK_DEVICE std::uint64_t matrix_descriptor(const void* tile, int offset = 0, int slab = 16) {
  const std::uint64_t address = shared_address(tile) + offset;
  return (address & 0x3FFFF) >> 4 | std::uint64_t(slab >> 4) << 16 | std::uint64_t(1024 >> 4) << 32 | std::uint64_t(1) << 62;
}

// The compiler knows nothing of x from here on, and computes nothing from it before.
MK_DEVICE void opaque(int& x) { asm volatile("" : "+r"(x)); }

// The compiler keeps the registers of d where they are, and no access to them crosses this line.
template <int N>
MK_DEVICE void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N>
MK_DEVICE void pin(std::uint32_t (&a)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

// Before the first wgmma of a batch: registers that threads have written are ready (accumulators, A from registers).
template <class... D>
MK_DEVICE void wgmma_fence(D&... d) {
  (pin(d), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
MK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `Pending` groups run. With Pending = 0 pass all accumulators: none is read before.
template <int Pending, class... D>
MK_DEVICE void wgmma_wait(D&... d) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  (pin(d), ...);
}

// Operands 0 to N / 2 - 1 of the assembly: the accumulators.
#define MK_PLACES_0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MK_PLACES_32 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MK_PLACES_64 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MK_PLACES_96 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MK_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MK_D32(i) MK_D8(i), MK_D8(i + 8), MK_D8(i + 16), MK_D8(i + 24)

// In MK_SS: %a, %b descriptors, %c accumulate, %ta, %tb MN-major. In MK_RS: %a0 to %a3 registers of A.
#define MK_WGMMA_HEAD(c) "{\n.reg .pred p;\nsetp.ne.b32 p, " c ", 0;\nwgmma.mma_async.sync.aligned.m64n"
#define MK_SS(N, type, places, registers, a, b, c, ta, tb)                                                            \
  asm volatile(MK_WGMMA_HEAD(c) #N "k16.f32." type "." type " {" places "}, " a ", " b ", p, 1, 1, " ta ", " tb ";\n}" \
               : registers                                                                                            \
               : "l"(a_tile), "l"(b_tile), "r"(int(accumulate)), "n"(int(AMajorM)), "n"(int(BMajorN)))
#define MK_RS(N, type, places, registers, a0, a1, a2, a3, b, c, tb)                                                  \
  asm volatile(MK_WGMMA_HEAD(c) #N "k16.f32." type "." type " {" places "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b    \
               ", p, 1, 1, " tb ";\n}"                                                                               \
               : registers                                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(int(accumulate)), "n"(int(BMajorN)))

#define MK_PLACES_OF_64 MK_PLACES_0
#define MK_PLACES_OF_80 MK_PLACES_0 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MK_PLACES_OF_112 \
  MK_PLACES_OF_80 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55"
#define MK_PLACES_OF_128 MK_PLACES_0 ", " MK_PLACES_32
#define MK_PLACES_OF_160                                                                          \
  MK_PLACES_OF_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define MK_PLACES_OF_176                                                                          \
  MK_PLACES_OF_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
                   "%80, %81, %82, %83, %84, %85, %86, %87"
#define MK_PLACES_OF_192 MK_PLACES_OF_128 ", " MK_PLACES_64
#define MK_PLACES_OF_256 MK_PLACES_OF_192 ", " MK_PLACES_96
#define MK_D_OF_64 MK_D32(0)
#define MK_D_OF_80 MK_D32(0), MK_D8(32)
#define MK_D_OF_112 MK_D32(0), MK_D8(32), MK_D8(40), MK_D8(48)
#define MK_D_OF_128 MK_D32(0), MK_D32(32)
#define MK_D_OF_160 MK_D32(0), MK_D32(32), MK_D8(64), MK_D8(72)
#define MK_D_OF_176 MK_D32(0), MK_D32(32), MK_D8(64), MK_D8(72), MK_D8(80)
#define MK_D_OF_192 MK_D32(0), MK_D32(32), MK_D32(64)
#define MK_D_OF_256 MK_D32(0), MK_D32(32), MK_D32(64), MK_D32(96)

// T bf16 or fp16. Both operands in shared memory; not accumulate: D = A B.
template <class T, int N, bool AMajorM, bool BMajorN>
MK_DEVICE void wgmma_ss(float (&d)[N / 2], std::uint64_t a_tile, std::uint64_t b_tile, bool accumulate) {
  static_assert(N == 64 || N == 80 || N == 112 || N == 128 || N == 160 || N == 176 || N == 192 || N == 256);
#define MK_TYPES(N, ...)                                                                        \
  if constexpr (std::is_same_v<T, bf16>) MK_SS(N, "bf16", MK_PLACES_OF_##N, MK_D_OF_##N, __VA_ARGS__); \
  else MK_SS(N, "f16", MK_PLACES_OF_##N, MK_D_OF_##N, __VA_ARGS__)
  if constexpr (N == 64) MK_TYPES(64, "%32", "%33", "%34", "%35", "%36");
  if constexpr (N == 80) MK_TYPES(80, "%40", "%41", "%42", "%43", "%44");
  if constexpr (N == 112) MK_TYPES(112, "%56", "%57", "%58", "%59", "%60");
  if constexpr (N == 128) MK_TYPES(128, "%64", "%65", "%66", "%67", "%68");
  if constexpr (N == 160) MK_TYPES(160, "%80", "%81", "%82", "%83", "%84");
  if constexpr (N == 176) MK_TYPES(176, "%88", "%89", "%90", "%91", "%92");
  if constexpr (N == 192) MK_TYPES(192, "%96", "%97", "%98", "%99", "%100");
  if constexpr (N == 256) MK_TYPES(256, "%128", "%129", "%130", "%131", "%132");
#undef MK_TYPES
}

// A from registers, 16-bit pairs: a[i] holds row 16 (t / 32 % 4) + t % 32 / 4 + 8 (i % 2), columns 2 (t % 4) + 8 (i / 2)
// and the next.
template <class T, int N, bool BMajorN>
MK_DEVICE void wgmma_rs(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b_tile, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256);
#define MK_TYPES(N, ...)                                                                        \
  if constexpr (std::is_same_v<T, bf16>) MK_RS(N, "bf16", MK_PLACES_OF_##N, MK_D_OF_##N, __VA_ARGS__); \
  else MK_RS(N, "f16", MK_PLACES_OF_##N, MK_D_OF_##N, __VA_ARGS__)
  if constexpr (N == 64) MK_TYPES(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38");
  if constexpr (N == 128) MK_TYPES(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70");
  if constexpr (N == 192) MK_TYPES(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102");
  if constexpr (N == 256) MK_TYPES(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134");
#undef MK_TYPES
}

#undef MK_SS
#undef MK_RS
#undef MK_WGMMA_HEAD
#undef MK_D8
#undef MK_D32

}  // namespace megakern

#endif

namespace megakern {

// Of a part of a tile in shared memory: the descriptor of what begins `bytes` behind it. The address is in the low bits,
// in units of 16 bytes, and does not carry.
MK_DEVICE std::uint64_t descriptor_behind(std::uint64_t descriptor, int bytes) {
  return (descriptor >> 32 << 32) | (std::uint32_t(descriptor) + std::uint32_t(bytes >> 4));
}

}  // namespace megakern
