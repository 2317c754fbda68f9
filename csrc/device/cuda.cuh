// The nvcc side of platform.cuh: names of this project for CUDA's own, and the launch. csrc/simt/device.h is its twin.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#define MK_KERNEL __global__
#define MK_DEVICE __device__ __forceinline__
#define MK_BOTH __host__ __device__ __forceinline__
#define MK_GRID_CONSTANT __grid_constant__

namespace megakern {

using bf16 = __nv_bfloat16;
using fp16 = __half;

MK_DEVICE float to_float(float x) { return x; }
MK_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
MK_DEVICE float to_float(fp16 x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
MK_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(x);
  else return x;
}

MK_DEVICE void from_float_pair(float a, float b, bf16* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  memcpy(out, &pair, sizeof pair);
}
MK_DEVICE void from_float_pair(float a, float b, fp16* out) {
  const __half2 pair = __floats2half2_rn(a, b);
  memcpy(out, &pair, sizeof pair);
}

// The compiler keeps nothing that it computed from `word` before: it holds the word alone, and computes the rest anew.
MK_DEVICE void forget_uses(unsigned& word) { asm volatile("" : "+r"(word)); }

MK_DEVICE void sync_block() { __syncthreads(); }
MK_DEVICE void sync_warp() { __syncwarp(); }
MK_DEVICE void yield_thread() { __nanosleep(32); }  // in every loop that waits for another thread's write
MK_DEVICE void fence_device() { __threadfence(); }

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Values of up to 16 bytes, as words; a value of two bytes travels in a word of its own.
template <class T, class F>
MK_DEVICE T shuffle_words(T value, F shuffle_word) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  constexpr int words = (sizeof(T) + 3) / 4;
  unsigned word[words] = {};
  memcpy(word, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < words; ++i) word[i] = shuffle_word(word[i]);
  memcpy(&value, word, sizeof(T));
  return value;
}

template <class T>
MK_DEVICE T shuffle(T value, int lane) {
  return shuffle_words(value, [=](unsigned w) { return __shfl_sync(kAllLanes, w, lane); });
}
template <class T>
MK_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle_words(value, [=](unsigned w) { return __shfl_xor_sync(kAllLanes, w, mask); });
}
template <class T>
MK_DEVICE T shuffle_up(T value, int delta) {
  return shuffle_words(value, [=](unsigned w) { return __shfl_up_sync(kAllLanes, w, delta); });
}
template <class T>
MK_DEVICE T shuffle_down(T value, int delta) {
  return shuffle_words(value, [=](unsigned w) { return __shfl_down_sync(kAllLanes, w, delta); });
}
MK_DEVICE unsigned ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }
MK_DEVICE bool any(bool predicate) { return __any_sync(kAllLanes, predicate); }
MK_DEVICE bool all(bool predicate) { return __all_sync(kAllLanes, predicate); }

// combine(a, b), commutative, over the lanes of the warp by xor distances 16, 8, 4, 2, 1; same bits in all lanes.
template <class T, class Combine>
MK_DEVICE T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value = combine(value, shuffle_xor(value, mask));
  return value;
}

// Old value. Integers alone: sums of floats by atomics would depend on the order.
template <class T>
MK_DEVICE T atomic_add(T* address, T value) {
  static_assert(std::is_integral_v<T>, "atomics on floats are not deterministic");
  if constexpr (sizeof(T) == 8) {
    return T(atomicAdd(reinterpret_cast<unsigned long long*>(address), (unsigned long long)(value)));
  } else {
    return T(atomicAdd(reinterpret_cast<unsigned*>(address), unsigned(value)));
  }
}
template <class T>
MK_DEVICE T atomic_max(T* address, T value) {
  static_assert(std::is_integral_v<T>);
  return atomicMax(address, value);
}

MK_DEVICE unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char start[];
  return start;
}
MK_DEVICE void check_shared_end(const unsigned char*) {}
MK_DEVICE void check_global(const void*) {}  // the emulator's: instructions for global memory alone

template <int bytes>
using Piece = std::conditional_t<
    bytes >= 16, uint4,
    std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, unsigned, unsigned short>>>;

// Moves `bytes` in pieces of up to 16, each of which must be aligned.
template <int bytes, class Move>
MK_DEVICE void access(void* to, const void* from, Move move) {
  using P = Piece<bytes>;
#pragma unroll
  for (int i = 0; i < bytes / int(sizeof(P)); ++i) move(static_cast<P*>(to) + i, static_cast<const P*>(from) + i);
}

// Data that nobody reads or writes again soon: the first to leave the caches. In global memory, as for all three here.
template <class P>
MK_DEVICE P load_streaming(const P* address) {
  return __ldcs(address);
}
// To global memory, in one instruction: an assignment of 16 bytes often becomes four of 4. Assembly outside of
// ptx*.cuh, since CUDA's own functions for it are ordered more strictly than a plain store.
template <class P>
MK_DEVICE void store_whole(P* address, P value) {
  if constexpr (sizeof(P) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
  } else {
    *address = value;
  }
}
template <class P>
MK_DEVICE void store_streaming(P* address, P value) {
  __stcs(address, value);
}

// kernel<<<grid, block, shared>>> on place.stream of place.device, for a kernel that `text` names, in clusters of
// `cluster` blocks along x. No blocks: no launch.
template <class... P>
void launch_cluster(const char* text, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, unsigned cluster,
                    Place place, std::common_type_t<P>... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  const bool elsewhere = error == cudaSuccess && place.device != current;
  if (elsewhere) error = cudaSetDevice(place.device);
  if (error == cudaSuccess && shared > 48 * 1024) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(place.stream);
    cudaLaunchAttribute attribute = {};
    if (cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  const cudaError_t last = cudaGetLastError();  // always, so that no error is left for somebody else's next call
  if (error == cudaSuccess) error = last;
  if (elsewhere) cudaSetDevice(current);
  if (error != cudaSuccess) {
    throw std::runtime_error("launch of " + launch_name(text) + " " + launch_shape(grid, block, shared) +
                             " failed: " + cudaGetErrorString(error));
  }
}

template <class... P>
void launch(const char* text, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, Place place,
            std::common_type_t<P>... arguments) {
  launch_cluster(text, kernel, grid, block, shared, 1, place, arguments...);
}

}  // namespace megakern
