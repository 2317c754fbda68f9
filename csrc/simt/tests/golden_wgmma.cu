// wgmma in every layout of its operands: d of each thread as the instruction leaves it.
#include "device/ptx.cuh"
#include "device/shared.cuh"
#include "simt/tests/cases.h"

namespace megakern {
namespace {

constexpr int kTile = 64 * 128;  // bytes of 64 rows of a tile
template <int N, bool BMajorN>
constexpr int kBytesOfB = (BMajorN ? round_up(N, 64) : N) * 128;  // N-major B in whole tiles of 64 columns

// a (64, 64) or, if AMajorM, (64 k, 64 m); b (N, 64) or, if BMajorN, (64 k, N). d (128, N / 2): += a b, k from 0 to 63.
template <class T, int N, bool AMajorM, bool BMajorN, bool FromRegisters>
MK_KERNEL void __launch_bounds__(128) wgmma_kernel(const MK_GRID_CONSTANT TensorMap a_map, const MK_GRID_CONSTANT TensorMap b_map,
                                                   const T* a, float* d) {
#if MK_SM90A
  SharedMemory shared;
  unsigned char* a_tile = shared.take<unsigned char>(kTile, 1024);
  unsigned char* b_tile = shared.take<unsigned char>(kBytesOfB<N, BMajorN>, 1024);
  MBarrier* loaded = shared.take<MBarrier>(1);
  const int t = int(threadIdx.x), lane = t % kWarp;
  if (t == 0) {
    mbar_init(loaded, 1, "loaded");
    mbar_init_fence();
    mbar_expect(loaded, kTile + kBytesOfB<N, BMajorN>);
    tma_load_2d(a_tile, &a_map, loaded, 0, 0);
    if constexpr (BMajorN) {
      for (int n = 0; n < N; n += 64) tma_load_2d(b_tile + n * 128, &b_map, loaded, n, 0);
    } else {
      tma_load_2d(b_tile, &b_map, loaded, 0, 0);
    }
  }
  sync_block();
  mbar_wait(loaded, 0);
  float sum[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum[i] = d[t * (N / 2) + i];
  std::uint32_t fragment[4][4];
  if constexpr (FromRegisters) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * (t / kWarp) + lane / 4 + 8 * (i % 2), col = 16 * k + 2 * (lane % 4) + 8 * (i / 2);
        memcpy(&fragment[k][i], a + row * 64 + col, 4);
      }
    }
  }
  if constexpr (FromRegisters) wgmma_fence(sum, fragment);
  else wgmma_fence(sum);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const std::uint64_t b_part = descriptor_behind(matrix_descriptor(b_tile, 0, kTile), BMajorN ? k * 2048 : k * 32);
    if constexpr (FromRegisters) {
      wgmma_rs<T, N, BMajorN>(sum, fragment[k], b_part, true);
    } else {
      wgmma_ss<T, N, AMajorM, BMajorN>(sum, matrix_descriptor(a_tile, AMajorM ? k * 2048 : k * 32, kTile), b_part, true);
    }
  }
  wgmma_commit();
  wgmma_wait<0>(sum);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[t * (N / 2) + i] = sum[i];
#endif
}

template <class T, int N, bool AMajorM, bool BMajorN, bool FromRegisters>
void run(const tests::Arguments& a) {
  const Dtype dtype = Dtype(a.number(0));
  const TensorMap a_map = matrix_map(a.tensor<void>(0), dtype, 64, 64, 64, 64, 64, Swizzle::b128);
  const TensorMap b_map = BMajorN ? matrix_map(a.tensor<void>(1), dtype, 64, N, N, 64, 64, Swizzle::b128)
                                  : matrix_map(a.tensor<void>(1), dtype, N, 64, 64, N, 64, Swizzle::b128);
  constexpr int shared = 1024 + kTile + kBytesOfB<N, BMajorN> + 16;
  MK_LAUNCH((wgmma_kernel<T, N, AMajorM, BMajorN, FromRegisters>), 1, 128, shared, a.place, a_map, b_map, a.tensor<T>(0),
            a.tensor<float>(2));
}

}  // namespace

// a, b, d; dtype, N, A is M-major, B is N-major, A from registers
MK_CASE(wgmma) {
  const auto key = [](Dtype dtype, int N, bool a_major_m, bool b_major_n, bool from_registers) {
    return (((int(dtype) * 512 + N) * 2 + a_major_m) * 2 + b_major_n) * 2 + from_registers;
  };
  const int wanted = key(Dtype(a.number(0)), a.number(1), a.number(2), a.number(3), a.number(4));
#define MK_ONE(T, dtype, ...) \
  if (wanted == key(Dtype::dtype, __VA_ARGS__)) return run<T, __VA_ARGS__>(a)
  MK_ONE(bf16, bf16, 64, false, false, false);
  MK_ONE(bf16, bf16, 64, false, true, false);
  MK_ONE(bf16, bf16, 64, true, false, false);
  MK_ONE(bf16, bf16, 64, true, true, false);
  MK_ONE(bf16, bf16, 80, false, false, false);
  MK_ONE(bf16, bf16, 112, false, false, false);
  MK_ONE(bf16, bf16, 128, false, false, false);
  MK_ONE(bf16, bf16, 128, false, true, false);
  MK_ONE(bf16, bf16, 128, true, true, false);
  MK_ONE(bf16, bf16, 160, false, false, false);
  MK_ONE(bf16, bf16, 160, false, true, false);
  MK_ONE(bf16, bf16, 160, true, true, false);
  MK_ONE(bf16, bf16, 176, false, false, false);
  MK_ONE(bf16, bf16, 256, false, false, false);
  MK_ONE(bf16, bf16, 256, false, true, false);
  MK_ONE(bf16, bf16, 256, true, true, false);
  MK_ONE(bf16, bf16, 64, false, false, true);
  MK_ONE(bf16, bf16, 64, false, true, true);
  MK_ONE(bf16, bf16, 128, false, true, true);
  MK_ONE(bf16, bf16, 192, false, true, true);
  MK_ONE(bf16, bf16, 256, false, true, true);
  MK_ONE(fp16, f16, 64, true, false, false);
  MK_ONE(fp16, f16, 128, false, true, false);
  MK_ONE(fp16, f16, 176, false, false, false);
  MK_ONE(fp16, f16, 256, false, false, false);
  MK_ONE(fp16, f16, 128, false, true, true);
#undef MK_ONE
  throw std::invalid_argument("wgmma: the library has no such kernel");
}

}  // namespace megakern
