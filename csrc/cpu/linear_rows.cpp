// Linear layers of a few rows, as a step of generation has them: y = act(x weight^T + bias) + residual.
//
// Writes with =. Threads take blocks of 16 outputs, each summed whole by one of them. rows.h has the product. Two cores
// of a Xeon, M = 1, weight (3072, 768): 21 GB/s of bf16 or fp32, which is what the memory gives.
#include <vector>

#include "checks.h"

#if defined(__x86_64__)
#include "rows.h"

namespace megakern {
namespace {

template <typename W, typename T, typename V>
void run(const LinearRowsProblem& p, Address x, Address weight, Address bias, Address residual, Address pre,
         Address y) {
  std::vector<float> wide(p.M * padded(p.K));
  for (int64_t m = 0; m < p.M; ++m)
    lay_out<W>(reinterpret_cast<const T*>(x) + m * p.x_stride, p.K, wide.data() + m * padded(p.K));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int id = 0; id < p.threads; ++id)
    product_share<W>(reinterpret_cast<const typename W::Stored*>(weight), reinterpret_cast<const V*>(bias), p.N, p.K,
                     wide.data(), static_cast<int>(p.M), p.activation, reinterpret_cast<const T*>(residual),
                     reinterpret_cast<T*>(pre), reinterpret_cast<T*>(y), id, p.threads);
}

}  // namespace
}  // namespace megakern
#endif

namespace megakern {

void linear_rows(const LinearRowsProblem& p, Address x, Address weight, Address bias, Address residual, Address pre,
                 Address y) {
  const char* op = "linear_rows";
  require_dtype(op, p.dtype);
  require_dtype(op, p.weight_dtype);
  require_dtype(op, p.bias_dtype);
  require(p.weight_dtype == kFloat32 || p.weight_dtype == p.dtype, "linear_rows: weight must be fp32 or of x's dtype");
  require(p.bias_dtype == kFloat32 || p.bias_dtype == p.dtype, "linear_rows: bias must be fp32 or of x's dtype");
  require(p.M >= 1 && p.M <= 8, "linear_rows: M must be between 1 and 8, got " + std::to_string(p.M));
  require_positive(op, "N", p.N);
  require_positive(op, "K", p.K);
  require_positive(op, "threads", p.threads);
  require_addressable(op, p.N, p.K);
  require(p.x_stride >= p.K, "linear_rows: the row stride of x must be at least K");
  require_addressable(op, p.M, p.x_stride);
  require(p.activation >= kNone && p.activation <= kSilu,
          "linear_rows: activation code must be 0 to 4, got " + std::to_string(p.activation));
  const int size = element_size(p.dtype);
  require_address(op, "x", x, size);
  require_address(op, "weight", weight, element_size(p.weight_dtype));
  require_address(op, "y", y, size);
  if (bias) require_address(op, "bias", bias, element_size(p.bias_dtype));
  if (residual) require_address(op, "residual", residual, size);
  if (residual) require_no_partial_overlap(op, "residual", residual, "y", y, p.M * p.N * size);
  const Address bytes = p.M * p.N * size;
  if (pre) require_address(op, "pre", pre, size);
  if (pre) require(pre + bytes <= y || y + bytes <= pre, "linear_rows: pre and y overlap");
  const Address x_end = x + Address(((p.M - 1) * p.x_stride + p.K) * size);
  require(x_end <= y || y + bytes <= x, "linear_rows: x and y overlap");
#if defined(__x86_64__)
  const bool wide_bias = p.bias_dtype == kFloat32;
  if (p.dtype == kFloat32) return run<Plain32, float, float>(p, x, weight, bias, residual, pre, y);
  if (p.weight_dtype == kFloat32 && wide_bias) return run<Rounded32, bf16, float>(p, x, weight, bias, residual, pre, y);
  if (p.weight_dtype == kFloat32) return run<Rounded32, bf16, bf16>(p, x, weight, bias, residual, pre, y);
  if (wide_bias) return run<Plain16, bf16, float>(p, x, weight, bias, residual, pre, y);
  return run<Plain16, bf16, bf16>(p, x, weight, bias, residual, pre, y);
#else
  require(false, "linear_rows: compiled for x86-64 only");
#endif
}

}  // namespace megakern
