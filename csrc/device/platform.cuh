// What every .cu of the project includes first. The same sources compile with nvcc (megakern._C) and, with
// -DMEGAKERN_SIMT, with a plain C++ compiler (megakern._simt), where csrc/simt runs them on the CPU.
//
// Both sides give the same names: bf16, fp16, to_float, from_float<T>; MK_KERNEL, MK_DEVICE, MK_LAUNCH; threadIdx,
// blockIdx, blockDim, gridDim; sync_block, sync_warp, shuffle*, ballot, any, all, warp_reduce;
// atomic_add, atomic_max; yield_thread; and the fast mathematics of ptx_math.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "api.h"

// MK_LAUNCH(kernel<...>, grid, block, shared_bytes, place, arguments...): starts the kernel, or throws
// std::runtime_error with its name and shape. MK_LAUNCH_CLUSTER takes the blocks of a cluster after shared_bytes.
#define MK_LAUNCH(...) ::megakern::launch(#__VA_ARGS__, __VA_ARGS__)
#define MK_LAUNCH_CLUSTER(...) ::megakern::launch_cluster(#__VA_ARGS__, __VA_ARGS__)

namespace megakern {

// The kernel in the text of a launch: all up to the first comma that is in no brackets.
inline std::string launch_name(const char* text) {
  int depth = 0;
  const char* end = text;
  for (; *end && (depth > 0 || *end != ','); ++end) depth += (*end == '<' || *end == '(') - (*end == '>' || *end == ')');
  const bool bracketed = *text == '(' && end[-1] == ')';
  return std::string(text + bracketed, end - bracketed);
}

template <class Dim3>
std::string launch_shape(Dim3 grid, Dim3 block, std::size_t shared) {
  const auto dims = [](Dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  return "grid " + dims(grid) + " block " + dims(block) + " shared memory " + std::to_string(shared) + " bytes";
}

}  // namespace megakern

#if defined(MEGAKERN_SIMT)
#include "simt/device.h"
#else
#include "device/cuda.cuh"
#endif

#include "device/ptx_math.cuh"

namespace megakern {

constexpr int kWarp = 32;

template <class I>
MK_BOTH constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

template <class I>
MK_BOTH constexpr I round_up(I a, I b) {
  return ceil_div(a, b) * b;
}

// Calls f with a value of the C++ type that `dtype` names: f(T{}). For kernels of floating point data.
template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(fp16{});
    default: throw std::invalid_argument("dtype must be f32, bf16 or f16, got code " + std::to_string(int(dtype)));
  }
}

}  // namespace megakern
