// The row sums of a cross-entropy and its gradient; megakern/kernels/torch/cross_entropy.py makes losses of the sums.
//
// Writes with =. Threads take rows; a row is read twice for the sums (maximum, then exponentials) and once for the
// gradient, which may overwrite the logits. fp32 and bf16, arithmetic in fp32.
#include "checks.h"

#if defined(__x86_64__)
#include <limits>

#include "simd.h"

namespace megakern {
namespace {

template <typename T>
MEGAKERN_INLINE float widened(const T* p) {
  return _mm512_cvtss_f32(load(p, Mask(1)));
}

template <typename T>
void row_sums(const T* logits, const int64_t* column, float* peak, float* exponentials, float* target, float* shifted,
              int64_t M, int64_t V, int64_t stride, int threads) {
  const float lowest = std::numeric_limits<float>::lowest();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < M; ++row) {
    const T* x = logits + row * stride;
    Vec top = set1(lowest);
    for (int64_t c = 0; c < V; c += kLanes) {
      const Mask m = first_lanes(V - c);
      top = _mm512_mask_max_ps(top, m, top, load(x + c, m));
    }
    const float largest = _mm512_reduce_max_ps(top);
    Vec sum = _mm512_setzero_ps(), sum_shifted = _mm512_setzero_ps();
    for (int64_t c = 0; c < V; c += kLanes) {
      const Mask m = first_lanes(V - c);
      const Vec s = _mm512_sub_ps(load(x + c, m), set1(largest));
      sum = _mm512_mask_add_ps(sum, m, sum, exp<kAccuracyOf<T>>(s));
      if (shifted) sum_shifted = _mm512_mask_add_ps(sum_shifted, m, sum_shifted, s);
    }
    peak[row] = largest;
    exponentials[row] = _mm512_reduce_add_ps(sum);
    target[row] = widened(x + column[row]) - largest;
    if (shifted) shifted[row] = _mm512_reduce_add_ps(sum_shifted);
  }
}

template <typename T>
void gradient(const T* logits, const int64_t* column, const float* lse, const float* factor, const float* uniform,
              const float* at_target, T* out, int64_t M, int64_t V, int64_t stride, int64_t out_stride, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < M; ++row) {
    const T* x = logits + row * stride;
    T* y = out + row * out_stride;
    const Vec shift = set1(lse[row]), scale = set1(factor[row]), less = set1(uniform ? uniform[row] : 0.0f);
    const auto value = [&](Vec l) __attribute__((always_inline)) {
      return _mm512_fmsub_ps(exp<kAccuracyOf<T>>(_mm512_sub_ps(l, shift)), scale, less);
    };
    const Vec own = _mm512_add_ps(value(load(x + column[row], Mask(1))), set1(at_target[row]));
    for (int64_t c = 0; c < V; c += kLanes) {
      const Mask m = first_lanes(V - c);
      store(y + c, value(load(x + c, m)), m);
    }
    store(y + column[row], own, Mask(1));
  }
}

}  // namespace
}  // namespace megakern
#endif

namespace megakern {
namespace {

void check(const char* op, Address logits, Address column, int dtype, int64_t M, int64_t V, int64_t stride,
           int threads) {
  require_dtype(op, dtype);
  require_positive(op, "M", M);
  require_positive(op, "V", V);
  require_positive(op, "threads", threads);
  require(stride >= V, std::string(op) + ": the row stride must be at least V = " + std::to_string(V) + ", got " +
                           std::to_string(stride));
  require_addressable(op, M, stride);
  require_address(op, "logits", logits, element_size(dtype));
  require_address(op, "column", column, 8);
  for (int64_t row = 0; row < M; ++row) {
    const int64_t c = reinterpret_cast<const int64_t*>(column)[row];
    require(c >= 0 && c < V, std::string(op) + ": column must be in [0, " + std::to_string(V) + "), got " +
                                 std::to_string(c) + " in row " + std::to_string(row));
  }
}

}  // namespace

void cross_entropy_sums(Address logits, Address column, Address peak, Address exponentials, Address target,
                        Address shifted, int dtype, int64_t M, int64_t V, int64_t stride, int threads) {
  const char* op = "cross_entropy_sums";
  check(op, logits, column, dtype, M, V, stride, threads);
  require_address(op, "peak", peak, 4);
  require_address(op, "exponentials", exponentials, 4);
  require_address(op, "target", target, 4);
  if (shifted) require_address(op, "shifted", shifted, 4);
#if defined(__x86_64__)
  const auto floats = [](Address a) { return reinterpret_cast<float*>(a); };
  const auto run = [&](auto* x) {
    row_sums(x, reinterpret_cast<const int64_t*>(column), floats(peak), floats(exponentials), floats(target),
             floats(shifted), M, V, stride, threads);
  };
  if (dtype == kBFloat16) return run(reinterpret_cast<const bf16*>(logits));
  return run(reinterpret_cast<const float*>(logits));
#else
  require(false, "cross_entropy_sums: compiled for x86-64 only");
#endif
}

void cross_entropy_gradient(Address logits, Address column, Address lse, Address factor, Address uniform,
                            Address at_target, Address out, int dtype, int64_t M, int64_t V, int64_t stride,
                            int64_t out_stride, int threads) {
  const char* op = "cross_entropy_gradient";
  check(op, logits, column, dtype, M, V, stride, threads);
  require(out_stride >= V, "cross_entropy_gradient: the row stride of out must be at least V = " + std::to_string(V) +
                               ", got " + std::to_string(out_stride));
  require_addressable(op, M, out_stride);
  require_address(op, "lse", lse, 4);
  require_address(op, "factor", factor, 4);
  if (uniform) require_address(op, "uniform", uniform, 4);
  require_address(op, "at_target", at_target, 4);
  require_address(op, "out", out, element_size(dtype));
  require(out != logits || out_stride == stride, "cross_entropy_gradient: in place, both strides must be the same");
#if defined(__x86_64__)
  const auto floats = [](Address a) { return reinterpret_cast<const float*>(a); };
  const auto run = [&](auto* x, auto* y) {
    gradient(x, reinterpret_cast<const int64_t*>(column), floats(lse), floats(factor), floats(uniform),
             floats(at_target), y, M, V, stride, out_stride, threads);
  };
  if (dtype == kBFloat16) return run(reinterpret_cast<const bf16*>(logits), reinterpret_cast<bf16*>(out));
  return run(reinterpret_cast<const float*>(logits), reinterpret_cast<float*>(out));
#else
  require(false, "cross_entropy_gradient: compiled for x86-64 only");
#endif
}

}  // namespace megakern
