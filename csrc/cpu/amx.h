// AMX: tile registers of 16 rows x 64 bytes, c (16, 16) fp32 += a (16, 32) b (32, 16) of bf16 in one instruction.
//
// With units of 2 bf16 (simd.h) a is 16 rows of 16 units, b is 16 units x 16 columns. The instructions are written as
// assembly, with the memory clobber that g++ 12's intrinsics lack. Tiles are state of a thread: whoever uses them holds
// a TileConfig.
#pragma once

#include <cstdint>

#include "simd.h"

namespace megakern {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileUnits = 16;
constexpr int kTile = kTileRows * kTileUnits;  // units of a tile
constexpr int64_t kTileDepth = 2 * kTileUnits;  // bf16 along the summed dimension

// All eight tiles are full ones, from construction to destruction.
class TileConfig {
 public:
  TileConfig() {
    alignas(64) struct {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t bytes_in_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileConfig() { asm volatile("tilerelease"); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

template <int tile>
MEGAKERN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// `stride` in bytes, from one row of the tile to the next.
template <int tile>
MEGAKERN_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
MEGAKERN_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}

template <int c, int a, int b>
MEGAKERN_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace
}  // namespace megakern
