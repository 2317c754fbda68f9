// Backward pass of an elementwise activation: dx = dy act'(x).
//
// Writes with =. Threads take blocks of elements. fp32 and bf16, arithmetic in fp32. The forward pass is linear_epilogue
// without bias and residual.
#include "checks.h"

#if defined(__x86_64__)
#include "activation.h"

namespace megakern {
namespace {

constexpr int64_t kBlock = 1 << 12;  // elements that a thread takes at a time

template <typename T, int kind>
void backward(const T* dy, const T* x, T* dx, int64_t elements, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < elements; first += kBlock) {
    const int64_t last = elements - first < kBlock ? elements : first + kBlock;
    for (int64_t i = first; i < last; i += kLanes) {
      const Mask m = first_lanes(last - i);
      store(dx + i, _mm512_mul_ps(load(dy + i, m), derivative<kind, kAccuracyOf<T>>(load(x + i, m))), m);
    }
  }
}

template <typename T>
void backward(Address dy, Address x, Address dx, int activation, int64_t elements, int threads) {
  const auto run = [&](auto* function) {
    function(reinterpret_cast<const T*>(dy), reinterpret_cast<const T*>(x), reinterpret_cast<T*>(dx), elements,
             threads);
  };
  switch (activation) {
    case kGelu: return run(backward<T, kGelu>);
    case kGeluTanh: return run(backward<T, kGeluTanh>);
    case kReluSquared: return run(backward<T, kReluSquared>);
    default: return run(backward<T, kSilu>);
  }
}

}  // namespace
}  // namespace megakern
#endif

namespace megakern {

void activation_backward(Address dy, Address x, Address dx, int dtype, int activation, int64_t elements, int threads) {
  const char* op = "activation_backward";
  require_dtype(op, dtype);
  require_positive(op, "elements", elements);
  require_positive(op, "threads", threads);
  require_addressable(op, elements, 1);
  const int size = element_size(dtype);
  require_address(op, "dy", dy, size);
  require_address(op, "x", x, size);
  require_address(op, "dx", dx, size);
  require_no_partial_overlap(op, "dy", dy, "dx", dx, elements * size);
  require_no_partial_overlap(op, "x", x, "dx", dx, elements * size);
  require(activation >= kGelu && activation <= kSilu,
          "activation_backward: activation code must be 1 to 4, got " + std::to_string(activation));
#if defined(__x86_64__)
  if (dtype == kBFloat16) return backward<bf16>(dy, x, dx, activation, elements, threads);
  return backward<float>(dy, x, dx, activation, elements, threads);
#else
  require(false, "activation_backward: compiled for x86-64 only");
#endif
}

}  // namespace megakern
