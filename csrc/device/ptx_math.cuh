// Fast mathematics, one function an instruction: the hardware's approximation on a GPU, the exact function on a CPU, so
// that the two agree to about 2 ulp (tanh_approx: 2^-11 relative). Subnormal results are flushed on the GPU alone.
#pragma once

#include <cmath>

namespace megakern {

#if defined(MEGAKERN_SIMT)

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float tanh_approx(float x) { return std::tanh(x); }

#else

#define MK_MATH(name, instruction)                                  \
  MK_DEVICE float name(float x) {                                   \
    float y;                                                        \
    asm(instruction ".f32 %0, %1;" : "=f"(y) : "f"(x));             \
    return y;                                                       \
  }
MK_MATH(exp2_approx, "ex2.approx.ftz")
MK_MATH(log2_approx, "lg2.approx.ftz")
MK_MATH(rcp_approx, "rcp.approx.ftz")
MK_MATH(rsqrt, "rsqrt.approx.ftz")
MK_MATH(tanh_approx, "tanh.approx")
#undef MK_MATH

#endif

MK_DEVICE float exp_approx(float x) { return exp2_approx(x * 1.4426950408889634f); }
MK_DEVICE float log_approx(float x) { return log2_approx(x) * 0.6931471805599453f; }

}  // namespace megakern
