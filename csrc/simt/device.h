// The CPU side of platform.cuh: the names that kernels use, over the fibers of threads.h. device/cuda.cuh is its twin.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "simt/threads.h"
#include "simt/types.h"

#define MK_KERNEL
#define MK_DEVICE inline
#define MK_BOTH inline
#define MK_GRID_CONSTANT
#define __launch_bounds__(...)

#define threadIdx (::megakern::simt::self->thread)
#define blockIdx (::megakern::simt::self->block->index)
#define blockDim (::megakern::simt::self->block->dim)
#define gridDim (::megakern::simt::self->block->grid)

namespace megakern {

using std::max;
using std::min;

inline void forget_uses(unsigned&) {}
inline void sync_block(MK_SITE) { simt::barrier_sync(0, 0, site); }
inline void sync_warp(MK_SITE) { simt::meet("sync_warp", site, nullptr); }
inline void yield_thread(MK_SITE) { simt::spin(site); }
inline void fence_device() {}

// The value of lane source(i) for lane i.
template <class T>
T shuffle_from(const char* name, T value, int source, simt::Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= simt::Warp::kValue);
  simt::Warp& warp = *simt::self->warp;
  const int lane = simt::self->lane;
  std::memcpy(warp.in[lane], &value, sizeof(T));
  warp.from[lane] = source;
  simt::meet(name, site, [](simt::Warp& w) {
    for (int i = 0; i < 32; ++i) {
      if (w.exists >> w.from[i] & 1) std::memcpy(w.out[i], w.in[w.from[i]], simt::Warp::kValue);
      else std::memset(w.out[i], 0xFF, simt::Warp::kValue);  // a lane that is not there has no value
    }
  });
  std::memcpy(&value, warp.out[lane], sizeof(T));
  return value;
}

template <class T>
T shuffle(T value, int lane, MK_SITE) {
  return shuffle_from("shuffle", value, lane & 31, site);
}
template <class T>
T shuffle_xor(T value, int mask, MK_SITE) {
  return shuffle_from("shuffle_xor", value, (simt::self->lane ^ mask) & 31, site);
}
template <class T>
T shuffle_up(T value, int delta, MK_SITE) {
  const int lane = simt::self->lane;
  return shuffle_from("shuffle_up", value, lane >= delta ? lane - delta : lane, site);
}
template <class T>
T shuffle_down(T value, int delta, MK_SITE) {
  const int lane = simt::self->lane;
  return shuffle_from("shuffle_down", value, lane + delta < 32 ? lane + delta : lane, site);
}

inline unsigned ballot(bool predicate, MK_SITE) {
  simt::Warp& warp = *simt::self->warp;
  warp.in[simt::self->lane][0] = predicate;
  simt::meet("ballot", site, [](simt::Warp& w) {
    unsigned mask = 0;
    for (int i = 0; i < 32; ++i) {
      if (w.exists >> i & 1) mask |= unsigned(w.in[i][0]) << i;
    }
    for (auto& out : w.out) std::memcpy(out, &mask, sizeof mask);
  });
  unsigned mask;
  std::memcpy(&mask, warp.out[simt::self->lane], sizeof mask);
  return mask;
}
inline bool any(bool predicate, MK_SITE) { return ballot(predicate, site) != 0; }
inline bool all(bool predicate, MK_SITE) { return ballot(!predicate, site) == 0; }

// combine(a, b), commutative, over the lanes of the warp by xor distances 16, 8, 4, 2, 1; same bits in all lanes. One
// meeting of the warp in place of five shuffles.
template <class T, class Combine>
T warp_reduce(T value, Combine combine, MK_SITE) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= simt::Warp::kValue);
  simt::Warp& warp = *simt::self->warp;
  const int lane = simt::self->lane;
  std::memcpy(warp.in[lane], &value, sizeof(T));
  const auto finish = [](simt::Warp& w) {
    if (w.exists != 0xFFFFFFFFu) simt::fail("warp_reduce wants a whole warp; make the block a multiple of 32 threads", w.site);
    const Combine& f = *static_cast<const Combine*>(w.argument);
    T now[32], next[32];
    for (int i = 0; i < 32; ++i) std::memcpy(&now[i], w.in[i], sizeof(T));
    for (int mask = 16; mask > 0; mask >>= 1) {
      for (int i = 0; i < 32; ++i) next[i] = f(now[i], now[i ^ mask]);
      std::memcpy(&now, &next, sizeof now);
    }
    for (int i = 0; i < 32; ++i) std::memcpy(w.out[i], &now[i], sizeof(T));
  };
  simt::meet("warp_reduce", site, finish, &combine);
  std::memcpy(&value, warp.out[lane], sizeof(T));
  return value;
}

// Old value. Integers alone: sums of floats by atomics would depend on the order.
template <class T>
T atomic_add(T* address, T value) {
  static_assert(std::is_integral_v<T>, "atomics on floats are not deterministic");
  const T old = __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
  simt::breathe();
  return old;
}
template <class T>
T atomic_max(T* address, T value) {
  static_assert(std::is_integral_v<T>);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  return old;
}

inline unsigned char* dynamic_shared_memory() { return simt::self->block->shared; }
inline void check_shared_end(const unsigned char* end) { simt::check_shared_end(end); }
inline void check_global(const void* address) { simt::check_global(address); }

// Moves `bytes` in pieces of up to 16, each of which must be aligned.
template <int bytes, class Move>
void access(void* to, const void* from, Move) {
  constexpr std::uintptr_t piece = bytes < 16 ? bytes : 16;
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % piece != 0) {
    simt::fail("load or store of " + std::to_string(bytes) + " bytes at an address that is no multiple of " +
                   std::to_string(piece), {});
  }
  std::memcpy(to, from, bytes);
}

// Runs the kernel on the CPU, block after block; an error in it reaches the caller as std::runtime_error.
template <class... P>
void launch_cluster(const char* text, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, unsigned cluster,
                    Place place, std::common_type_t<P>... arguments) {
  const auto body = [&] { kernel(arguments...); };
  const auto call = [](const void* f) { (*static_cast<const decltype(body)*>(f))(); };
  simt::run({text, grid, block, shared, cluster, place.device, call, &body});
}

template <class... P>
void launch(const char* text, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, Place place,
            std::common_type_t<P>... arguments) {
  launch_cluster(text, kernel, grid, block, shared, 1, place, arguments...);
}

}  // namespace megakern
