// Checks of the arguments that the launches of attention kernels share; beside those of checks.h.
#pragma once

#include <cmath>

#include "device/checks.h"
#include "device/vector.cuh"

namespace megakern {

class AttentionChecks : public Checks {
 public:
  static constexpr int64_t most = 1 << 28;  // of a size

  AttentionChecks(const char* op, Dtype dtype, const AttentionSizes& s, int64_t left, int64_t right, float scale)
      : Checks(op), dtype_(dtype), sizes_(s) {
    require(dtype == Dtype::bf16 || dtype == Dtype::f16,
            "dtype must be code 1 (bf16) or 2 (fp16), got " + std::to_string(int(dtype)));
    require(s.D >= 8 && s.D <= 256 && s.D % 8 == 0, "D must be a multiple of 8 up to 256, got " + std::to_string(s.D));
    size("B", s.B, 1, most), size("T", s.T, 1, most), size("H", s.H, 1, most), size("Hkv", s.Hkv, 1, s.H);
    size("B H", s.B * s.H, 1, most), size("left", left, -1, most), size("right", right, -1, most);
    require(s.H % s.Hkv == 0, "Hkv must divide H");
    require(std::isfinite(scale), "scale must be finite");
  }

  // -> whether the sequences are packed.
  bool offsets(const int* q_offsets, const int* k_offsets, int64_t sequences) {
    require(!q_offsets == !k_offsets, "q_offsets and k_offsets come in pairs");
    if (!q_offsets) return false;
    require(sizes_.B == 1, "B must be 1 with offsets, got " + std::to_string(sizes_.B));
    size("sequences", sequences, 1, most);
    reads("q_offsets", q_offsets, Dtype::i32, sequences + 1), reads("k_offsets", k_offsets, Dtype::i32, sequences + 1);
    return true;
  }

  void features(const AttentionFeatures& f, int64_t samples) {
    require(f.softcap >= 0, "softcap must be at least 0");
    if (!f.slopes) return;
    require(f.slope_stride == 0 || f.slope_stride >= sizes_.H, "slope_stride must be 0 or at least H");
    reads("slopes", f.slopes, Dtype::f32, f.slope_stride == 0 ? 1 : samples, sizes_.H, f.slope_stride);
  }

  // x (B, T, H, D), read by TMA or in pieces of 16 bytes.
  void rows(const char* name, const void* x, const AttentionStrides& by, int64_t B, int64_t T, int64_t H) {
    require(vectors_fit(x, by.token * 2) && vectors_fit(x, by.head * 2) && vectors_fit(x, by.sample * 2),
            std::string("the rows of ") + name + " must start on multiples of 16 bytes");
    require(by.token > 0 && by.head > 0 && by.sample > 0, std::string("the strides of ") + name + " must be above 0");
    reads(name, x, dtype_, (B - 1) * by.sample + (T - 1) * by.token + (H - 1) * by.head + sizes_.D);
  }

  // x of `count` values of `dtype`, written in pieces of 16 bytes.
  void fills(const char* name, const void* x, Dtype dtype, int64_t count) {
    require(vectors_fit(x, 16), std::string(name) + " must start on a multiple of 16 bytes");
    writes(name, x, dtype, count);
  }

 private:
  Dtype dtype_;
  AttentionSizes sizes_;
};

}  // namespace megakern
