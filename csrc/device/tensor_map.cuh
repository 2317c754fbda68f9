// Tensor maps: what the copy engine of sm_90 (TMA) knows about a tensor in global memory. Made on the host for each
// launch, passed to the kernel by value as `const MK_GRID_CONSTANT TensorMap`.
#pragma once

#include "device/platform.cuh"

namespace megakern {

// How a box lies in shared memory. b128: rows of 128 bytes, in which 16-byte piece c of row r is at piece c ^ (r % 8).
enum class Swizzle { none, b128 };

}  // namespace megakern

#if defined(MEGAKERN_SIMT)
#include "simt/tensor_map.h"
#else

#include <cuda.h>

namespace megakern {

using TensorMap = CUtensorMap;

// The tensor at `base`: `rank` sizes in elements, innermost first; strides in bytes of dimensions 1 to rank - 1, each a
// multiple of 16; `box` is what one copy moves. Elements outside the sizes are read as zero and never written.
inline TensorMap tensor_map(const void* base, Dtype dtype, int rank, const std::uint64_t* sizes,
                            const std::uint64_t* strides, const std::uint32_t* box, Swizzle swizzle) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // From the driver at run time: the module links no libcuda, so it loads on machines without one.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = {};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
            cudaSuccess || found != cudaDriverEntryPointSuccess) {
      function = nullptr;
    }
    return reinterpret_cast<Encode>(function);
  }();
  if (encode == nullptr) throw std::runtime_error("the NVIDIA driver has no cuTensorMapEncodeTiled; it must be 525 or newer");
  const CUtensorMapDataType type = dtype == Dtype::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, type, rank, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle == Swizzle::b128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled refused a tensor: error " + std::to_string(int(result)));
  }
  return map;
}

}  // namespace megakern

#endif

namespace megakern {

// A matrix of `rows` rows of `cols` elements, `stride` elements apart, in boxes of box_rows x box_cols.
inline TensorMap matrix_map(const void* base, Dtype dtype, std::int64_t rows, std::int64_t cols, std::int64_t stride,
                            int box_rows, int box_cols, Swizzle swizzle) {
  const std::uint64_t sizes[] = {std::uint64_t(cols), std::uint64_t(rows)};
  const std::uint64_t strides[] = {std::uint64_t(stride) * (dtype == Dtype::f32 ? 4 : 2)};
  const std::uint32_t box[] = {std::uint32_t(box_cols), std::uint32_t(box_rows)};
  return tensor_map(base, dtype, 2, sizes, strides, box, swizzle);
}

}  // namespace megakern
