// The CPU side of ptx.cuh: the same names, each keeping the rules of its instruction.
#pragma once

#include "simt/threads.h"

namespace megakern {

struct alignas(8) MBarrier {
  std::uint64_t bits;
};

namespace simt {

std::uint32_t shared_address(const void* p);

void mbar_init(MBarrier* b, int arrivals, const char* name, Site site);
void mbar_init_fence();
void mbar_arrive(MBarrier* b, int rank, Site site);  // rank -1: of this block
void mbar_expect(MBarrier* b, int bytes, Site site);
bool mbar_try_wait(MBarrier* b, int parity, Site site);
void mbar_wait(MBarrier* b, int parity, Site site);
void fence_async();

void tma_load(void* to, const TensorMap* map, MBarrier* b, const int* at, int rank, int blocks, Site site);
void bulk_load(void* to, const void* from, MBarrier* b, int bytes, Site site);
void tma_store(const TensorMap* map, const void* from, const int* at, int rank, bool add, Site site);
void bulk_store(void* to, const void* from, int bytes, bool add, Site site);
void tma_commit();
void tma_wait(int pending, bool read_only);

int cluster_rank();
void cluster_arrive(Site site);
void cluster_wait(Site site);
void* cluster_shared(void* place, int rank, Site site);

void cp_async(void* to, const void* from, int bytes, int valid, Site site);
void cp_async_commit();
void cp_async_wait(int pending);
void cp_async_arrive(MBarrier* b, Site site);

void ldmatrix(const void* row, std::uint32_t* r, int count, bool transposed, Site site);
void stmatrix(void* row, const std::uint32_t* r, int count, bool transposed, Site site);
void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b, bool is_bf16, Site site);

void wgmma_fence(const Registers* named, int count);
void wgmma_issue(float* d, int N, const std::uint32_t* a_registers, std::uint64_t a, std::uint64_t b, bool a_major_m,
                 bool b_major_n, bool accumulate, bool is_bf16, Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, float* const* d, int count, Site site);

}  // namespace simt

inline std::uint32_t shared_address(const void* p) { return simt::shared_address(p); }

// --- mbarrier ---

inline void mbar_init(MBarrier* b, int arrivals, const char* name, MK_SITE) { simt::mbar_init(b, arrivals, name, site); }
inline void mbar_init_fence() { simt::mbar_init_fence(); }
inline void mbar_arrive(MBarrier* b, MK_SITE) { simt::mbar_arrive(b, -1, site); }
inline void mbar_arrive_at(MBarrier* b, int rank, MK_SITE) { simt::mbar_arrive(b, rank, site); }
inline void mbar_expect(MBarrier* b, int bytes, MK_SITE) { simt::mbar_expect(b, bytes, site); }
inline bool mbar_try_wait(MBarrier* b, int parity, MK_SITE) { return simt::mbar_try_wait(b, parity, site); }
inline void mbar_wait(MBarrier* b, int parity, MK_SITE) { simt::mbar_wait(b, parity, site); }
inline void fence_async() { simt::fence_async(); }
// Not lane 0: code that takes the two for the same fails.
inline bool elect_lane(MK_SITE) {
  simt::meet("elect_lane", site, nullptr);
  return simt::self->lane == 31;
}

// --- TMA ---

inline void prefetch_map(const TensorMap*) {}

inline void tma_load_1d(void* to, const TensorMap* map, MBarrier* b, int x, MK_SITE) {
  simt::tma_load(to, map, b, &x, 1, 0, site);
}
inline void tma_load_2d(void* to, const TensorMap* map, MBarrier* b, int x, int y, MK_SITE) {
  const int at[] = {x, y};
  simt::tma_load(to, map, b, at, 2, 0, site);
}
inline void tma_load_3d(void* to, const TensorMap* map, MBarrier* b, int x, int y, int z, MK_SITE) {
  const int at[] = {x, y, z};
  simt::tma_load(to, map, b, at, 3, 0, site);
}
inline void tma_load_4d(void* to, const TensorMap* map, MBarrier* b, int x, int y, int z, int w, MK_SITE) {
  const int at[] = {x, y, z, w};
  simt::tma_load(to, map, b, at, 4, 0, site);
}
inline void tma_load_2d_multicast(void* to, const TensorMap* map, MBarrier* b, int x, int y, int blocks, MK_SITE) {
  const int at[] = {x, y};
  simt::tma_load(to, map, b, at, 2, blocks, site);
}
inline void tma_load_4d_multicast(void* to, const TensorMap* map, MBarrier* b, int x, int y, int z, int w, int blocks,
                                  MK_SITE) {
  const int at[] = {x, y, z, w};
  simt::tma_load(to, map, b, at, 4, blocks, site);
}
inline void bulk_load(void* to, const void* from, MBarrier* b, int bytes, MK_SITE) {
  simt::bulk_load(to, from, b, bytes, site);
}
inline void tma_store_1d(const TensorMap* map, const void* from, int x, MK_SITE) {
  simt::tma_store(map, from, &x, 1, false, site);
}
inline void tma_store_2d(const TensorMap* map, const void* from, int x, int y, MK_SITE) {
  const int at[] = {x, y};
  simt::tma_store(map, from, at, 2, false, site);
}
inline void tma_store_3d(const TensorMap* map, const void* from, int x, int y, int z, MK_SITE) {
  const int at[] = {x, y, z};
  simt::tma_store(map, from, at, 3, false, site);
}
inline void tma_store_4d(const TensorMap* map, const void* from, int x, int y, int z, int w, MK_SITE) {
  const int at[] = {x, y, z, w};
  simt::tma_store(map, from, at, 4, false, site);
}
inline void tma_add_2d(const TensorMap* map, const void* from, int x, int y, MK_SITE) {
  const int at[] = {x, y};
  simt::tma_store(map, from, at, 2, true, site);
}
inline void bulk_store(void* to, const void* from, int bytes, MK_SITE) { simt::bulk_store(to, from, bytes, false, site); }
inline void bulk_add(float* to, const float* from, int bytes, MK_SITE) { simt::bulk_store(to, from, bytes, true, site); }
inline void add_four(float* to, const float (&v)[4], MK_SITE) {
  check_global(to);
  if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0) simt::fail("add_four at an address that is no multiple of 16", site);
  for (int i = 0; i < 4; ++i) {
    float old, sum;
    __atomic_load(to + i, &old, __ATOMIC_RELAXED);
    do sum = old + v[i];
    while (!__atomic_compare_exchange(to + i, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  }
  simt::breathe();
}
inline void tma_commit() { simt::tma_commit(); }
template <int Pending>
void tma_wait_read() {
  simt::tma_wait(Pending, true);
}
template <int Pending>
void tma_wait() {
  simt::tma_wait(Pending, false);
}

// --- named barriers, clusters, registers ---

template <int Id>
void barrier_sync(int threads, MK_SITE) {
  static_assert(Id >= 1 && Id <= 15);
  simt::barrier_sync(Id, threads, site);
}
template <int Id>
void barrier_arrive(int threads, MK_SITE) {
  static_assert(Id >= 1 && Id <= 15);
  simt::barrier_arrive(Id, threads, site);
}

inline int cluster_rank() { return simt::cluster_rank(); }
inline void cluster_arrive(MK_SITE) { simt::cluster_arrive(site); }
inline void cluster_wait(MK_SITE) { simt::cluster_wait(site); }
template <class T>
T* cluster_shared(T* place, int rank, MK_SITE) {
  return static_cast<T*>(simt::cluster_shared(place, rank, site));
}

template <int Count>
void registers_shrink(MK_SITE) {
  static_assert(Count >= 24 && Count <= 240 && Count % 8 == 0);
  simt::meet("setmaxnreg", site, nullptr);
}
template <int Count>
void registers_grow(MK_SITE) {
  static_assert(Count >= 24 && Count <= 240 && Count % 8 == 0);
  simt::meet("setmaxnreg", site, nullptr);
}

// --- of a warp ---

template <int Bytes>
void cp_async(void* to, const void* from, int valid = Bytes, MK_SITE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::cp_async(to, from, Bytes, valid, site);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int Pending>
void cp_async_wait() {
  simt::cp_async_wait(Pending);
}
inline void cp_async_arrive(MBarrier* b, MK_SITE) { simt::cp_async_arrive(b, site); }

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, MK_SITE) { simt::ldmatrix(row, r, 4, false, site); }
inline void ldmatrix_x4_transposed(std::uint32_t (&r)[4], const void* row, MK_SITE) {
  simt::ldmatrix(row, r, 4, true, site);
}
inline void stmatrix_x4(void* row, const std::uint32_t (&r)[4], MK_SITE) { simt::stmatrix(row, r, 4, false, site); }
inline void stmatrix_x4_transposed(void* row, const std::uint32_t (&r)[4], MK_SITE) {
  simt::stmatrix(row, r, 4, true, site);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], MK_SITE) {
  simt::mma_m16n8k16(d, a, b, std::is_same_v<T, bf16>, site);
}

// --- wgmma ---

inline std::uint64_t matrix_descriptor(const void* tile, int offset = 0, int slab = 16) {
  const std::uint64_t address = shared_address(tile) + std::uint32_t(offset);
  return (address & 0x3FFFF) >> 4 | std::uint64_t(slab >> 4) << 16 | std::uint64_t(1024 >> 4) << 32 | std::uint64_t(1) << 62;
}

inline void opaque(int&) {}
template <class... D>
void wgmma_fence(D&... d) {
  const simt::Registers named[] = {{&d, sizeof d}..., {}};
  simt::wgmma_fence(named, int(sizeof...(D)));
}
inline void wgmma_commit(MK_SITE) { simt::wgmma_commit(site); }
template <int Pending, class... D>
void wgmma_wait(D&... d) {
  float* const registers[] = {d..., nullptr};
  simt::wgmma_wait(Pending, registers, int(sizeof...(D)), {"wgmma_wait", Pending});
}

template <class T, int N, bool AMajorM, bool BMajorN>
void wgmma_ss(float (&d)[N / 2], std::uint64_t a_tile, std::uint64_t b_tile, bool accumulate, MK_SITE) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  simt::wgmma_issue(d, N, nullptr, a_tile, b_tile, AMajorM, BMajorN, accumulate, std::is_same_v<T, bf16>, site);
}
template <class T, int N, bool BMajorN>
void wgmma_rs(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b_tile, bool accumulate, MK_SITE) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  simt::wgmma_issue(d, N, a, 0, b_tile, false, BMajorN, accumulate, std::is_same_v<T, bf16>, site);
}

}  // namespace megakern
