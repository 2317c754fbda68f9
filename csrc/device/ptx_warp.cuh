// One function an instruction, of sm_80 on: copies by single threads (cp.async), 8 x 8 matrices between shared memory and
// the registers of a warp, products of a warp (mma). ptx.cuh includes it.
#pragma once

#include "device/platform.cuh"

namespace megakern {

MK_DEVICE std::uint32_t shared_address(const void* p) { return std::uint32_t(__cvta_generic_to_shared(p)); }

// --- cp.async: each thread copies for itself, and then tells the others by a barrier ---

// Bytes 4, 8 or 16, both addresses on multiples of that; of them `valid` are read, the rest becomes zero. Belongs to the
// thread's current group until cp_async_commit closes it. 16 bytes go past the first level of cache.
template <int Bytes>
MK_DEVICE void cp_async(void* to, const void* from, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "n"(Bytes), "r"(valid)
                 : "memory");
  }
}
MK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `Pending` of the thread's groups run.
template <int Pending>
MK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// --- matrices of 8 x 8 values of 16 bits ---
//
// Lane l gives the address of row l % 8 (16 bytes) of matrix l / 8. Register i is of matrix i: row lane / 4, columns
// 2 (lane % 4) and the next; transposed: column lane / 4, rows 2 (lane % 4) and the next.

#define MK_MATRIX_LOAD(name, options)                                                                            \
  MK_DEVICE void name(std::uint32_t (&r)[4], const void* row) {                                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" options ".shared.b16 {%0, %1, %2, %3}, [%4];"                   \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                                \
                 : "r"(shared_address(row))                                                                      \
                 : "memory");                                                                                    \
  }
MK_MATRIX_LOAD(ldmatrix_x4, "")
MK_MATRIX_LOAD(ldmatrix_x4_transposed, ".trans")
#undef MK_MATRIX_LOAD

// sm_90 on.
#define MK_MATRIX_STORE(name, options)                                                                           \
  MK_DEVICE void name(void* row, const std::uint32_t (&r)[4]) {                                                  \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" options ".shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(            \
                     shared_address(row)),                                                                       \
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])                                                      \
                 : "memory");                                                                                    \
  }
MK_MATRIX_STORE(stmatrix_x4, "")
MK_MATRIX_STORE(stmatrix_x4_transposed, ".trans")
#undef MK_MATRIX_STORE

// --- mma: d (16, 8) += a (16, 16) b (16, 8) by a warp, sums in fp32 ---
//
// With g = lane / 4, t = 2 (lane % 4): a[i] holds row g + 8 (i % 2), columns t + 8 (i / 2) and the next; b[i] column g,
// rows t + 8 i and the next; d[i] row g + 8 (i / 2), column t + i % 2. T is bf16 or fp16.
template <class T>
MK_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#define MK_MMA(type)                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                             \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, bf16>) MK_MMA("bf16");
  else MK_MMA("f16");
#undef MK_MMA
}

}  // namespace megakern
