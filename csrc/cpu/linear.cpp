// What follows a matrix product: bias, activation, residual in one pass; and the column sums of a bias gradient.
//
// Writes with =. linear_epilogue: threads take blocks of rows. column_sum: threads take chunks of kChunk rows, whose
// sums are added in order, so the result does not depend on the number of threads. fp32 and bf16, arithmetic in fp32.
#include <vector>

#include "checks.h"

#if defined(__x86_64__)
#include "activation.h"

namespace megakern {
namespace {

constexpr int64_t kBlock = 1 << 12;  // elements that a thread takes at a time where rows do not matter

template <typename T, int kind>
void epilogue(const T* z, const float* bias, const T* residual, T* pre, T* y, int64_t M, int64_t N, int threads) {
  const int64_t elements = M * N, width = bias ? N : kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < elements; start += width) {
    const int64_t columns = elements - start < width ? elements - start : width;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t i = start + c;
      const Mask m = first_lanes(columns - c);
      Vec x = load(z + i, m);
      if (bias) x = _mm512_add_ps(x, load(bias + c, m));
      if (pre) store(pre + i, x, m);
      x = activate<kind, kAccuracyOf<T>>(x);
      if (residual) x = _mm512_add_ps(x, load(residual + i, m));
      store(y + i, x, m);
    }
  }
}

template <typename T>
void epilogue(Address z, Address bias, Address residual, Address pre, Address y, int activation, int64_t M, int64_t N,
              int threads) {
  const auto run = [&](auto* function) {
    function(reinterpret_cast<const T*>(z), reinterpret_cast<const float*>(bias), reinterpret_cast<const T*>(residual),
             reinterpret_cast<T*>(pre), reinterpret_cast<T*>(y), M, N, threads);
  };
  switch (activation) {
    case kGelu: return run(epilogue<T, kGelu>);
    case kGeluTanh: return run(epilogue<T, kGeluTanh>);
    case kReluSquared: return run(epilogue<T, kReluSquared>);
    case kSilu: return run(epilogue<T, kSilu>);
    default: return run(epilogue<T, kNone>);
  }
}

constexpr int64_t kChunk = 256;  // rows whose sum one thread makes
constexpr int kRows = 8;         // rows added up in registers

template <typename T>
void add_rows(const T* x, float* sum, int64_t rows, int64_t N, int64_t stride) {
  for (int64_t c = 0; c < N; c += kLanes) store(sum + c, _mm512_setzero_ps(), first_lanes(N - c));
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = rows - first < kRows ? rows - first : kRows;
    for (int64_t c = 0; c < N; c += kLanes) {
      const Mask m = first_lanes(N - c);
      const T* p = x + first * stride + c;
      Vec total = load(p, m);
      for (int64_t r = 1; r < count; ++r) total = _mm512_add_ps(total, load(p + r * stride, m));
      store(sum + c, _mm512_add_ps(load(sum + c, m), total), m);
    }
  }
}

template <typename T>
void column_sum(const T* x, float* out, int64_t M, int64_t N, int64_t stride, int threads) {
  const int64_t chunks = (M + kChunk - 1) / kChunk;
  std::vector<float> parts(chunks * N);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t rows = M - i * kChunk < kChunk ? M - i * kChunk : kChunk;
    add_rows(x + i * kChunk * stride, parts.data() + i * N, rows, N, stride);
  }
  for (int64_t c = 0; c < N; c += kLanes) {
    const Mask m = first_lanes(N - c);
    Vec total = load(parts.data() + c, m);
    for (int64_t i = 1; i < chunks; ++i) total = _mm512_add_ps(total, load(parts.data() + i * N + c, m));
    store(out + c, total, m);
  }
}

}  // namespace
}  // namespace megakern
#endif

namespace megakern {

void linear_epilogue(Address z, Address bias, Address residual, Address pre, Address y, int dtype, int activation,
                     int64_t M, int64_t N, int threads) {
  const char* op = "linear_epilogue";
  require_dtype(op, dtype);
  require_positive(op, "M", M);
  require_positive(op, "N", N);
  require_positive(op, "threads", threads);
  require_addressable(op, M, N);
  const int size = element_size(dtype);
  const int64_t bytes = M * N * size;
  require_address(op, "z", z, size);
  require_address(op, "y", y, size);
  require_no_partial_overlap(op, "z", z, "y", y, bytes);
  if (bias) require_address(op, "bias", bias, 4);
  if (residual) require_address(op, "residual", residual, size);
  if (residual) require_no_partial_overlap(op, "residual", residual, "y", y, bytes);
  if (pre) require_address(op, "pre", pre, size);
  if (pre) require_no_partial_overlap(op, "z", z, "pre", pre, bytes);
  if (pre) require(pre + Address(bytes) <= y || y + Address(bytes) <= pre, "linear_epilogue: pre and y overlap");
  require(activation >= kNone && activation <= kSilu,
          "linear_epilogue: activation code must be 0 to 4, got " + std::to_string(activation));
#if defined(__x86_64__)
  if (dtype == kBFloat16) return epilogue<bf16>(z, bias, residual, pre, y, activation, M, N, threads);
  return epilogue<float>(z, bias, residual, pre, y, activation, M, N, threads);
#else
  require(false, "linear_epilogue: compiled for x86-64 only");
#endif
}

void column_sum(Address x, Address out, int dtype, int64_t M, int64_t N, int64_t stride, int threads) {
  const char* op = "column_sum";
  require_dtype(op, dtype);
  require_positive(op, "M", M);
  require_positive(op, "N", N);
  require_positive(op, "threads", threads);
  require(stride >= N, "column_sum: the row stride must be at least N = " + std::to_string(N) + ", got " +
                           std::to_string(stride));
  require_addressable(op, M, stride);
  require_address(op, "x", x, element_size(dtype));
  require_address(op, "out", out, 4);
#if defined(__x86_64__)
  float* sums = reinterpret_cast<float*>(out);
  if (dtype == kBFloat16) return column_sum(reinterpret_cast<const bf16*>(x), sums, M, N, stride, threads);
  return column_sum(reinterpret_cast<const float*>(x), sums, M, N, stride, threads);
#else
  require(false, "column_sum: compiled for x86-64 only");
#endif
}

}  // namespace megakern
