// LayerNorm and RMSNorm of x + residual, forward and backward; megakern/ops/norm.py has the formulas.
//
// Writes with =. Threads take rows. The gradients of weight and bias are summed over chunks of kChunk rows, each by one
// thread, and the chunks are added in order, so the result does not depend on the number of threads. fp32 and bf16,
// arithmetic in fp32. Centring is done before squaring, so a large mean costs no digits.
#include <type_traits>
#include <vector>

#include "checks.h"

#if defined(__x86_64__)
#include "simd.h"

namespace megakern {
namespace {

template <typename T>
struct Forward {
  const T *x, *residual;
  const float *weight, *bias;
  T *h, *y;
  float *mean, *rstd;
  int64_t M, C;
  float eps;
  int threads;
};

template <typename T>
void run(const Forward<T>& a) {
#pragma omp parallel num_threads(a.threads)
  {
    std::vector<float> row(a.C);  // h as it is stored, in fp32
    float* wide = row.data();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < a.M; ++r) {
      const int64_t start = r * a.C;
      Vec sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < a.C; c += kLanes) {
        const Mask m = first_lanes(a.C - c);
        Vec h = load(a.x + start + c, m);
        if (a.residual) {
          h = _mm512_add_ps(h, load(a.residual + start + c, m));
          store(a.h + start + c, h, m);
          h = load(a.h + start + c, m);
        }
        store(wide + c, h, m);
        sum = _mm512_add_ps(sum, h);
      }
      const float mean = a.mean ? _mm512_reduce_add_ps(sum) / static_cast<float>(a.C) : 0.0f;
      Vec squares = _mm512_setzero_ps();
      for (int64_t c = 0; c < a.C; c += kLanes) {
        const Mask m = first_lanes(a.C - c);
        const Vec centred = _mm512_maskz_sub_ps(m, load(wide + c, m), set1(mean));
        squares = fma(centred, centred, squares);
      }
      const float rstd = 1.0f / _mm512_cvtss_f32(_mm512_sqrt_ps(
                                    set1(_mm512_reduce_add_ps(squares) / static_cast<float>(a.C) + a.eps)));
      for (int64_t c = 0; c < a.C; c += kLanes) {
        const Mask m = first_lanes(a.C - c);
        const Vec normed = _mm512_mul_ps(_mm512_sub_ps(load(wide + c, m), set1(mean)), set1(rstd));
        const Vec bias = a.bias ? load(a.bias + c, m) : _mm512_setzero_ps();
        store(a.y + start + c, fma(normed, load(a.weight + c, m), bias), m);
      }
      if (a.mean) a.mean[r] = mean;
      a.rstd[r] = rstd;
    }
  }
}

template <typename T>
struct Backward {
  const T *dy, *dh, *h;
  const float *weight, *mean, *rstd;
  T* dx;
  float *dweight, *dbias;
  int64_t M, C;
  int threads;
};

constexpr int64_t kChunk = 64;  // rows whose share of dweight and dbias one thread sums

// dx = rstd (g - mean(g) - n mean(g n)) + dh with g = dy weight, n = (h - mean) rstd; RMSNorm has no mean(g).
template <typename T>
void rows(const Backward<T>& a, int64_t first, int64_t last, float* dweight, float* dbias) {
  const float per_column = 1.0f / static_cast<float>(a.C);
  for (int64_t c = 0; c < a.C; ++c) dweight[c] = dbias[c] = 0.0f;
  for (int64_t r = first; r < last; ++r) {
    const T *dy = a.dy + r * a.C, *h = a.h + r * a.C, *dh = a.dh ? a.dh + r * a.C : nullptr;
    const Vec mean = set1(a.mean ? a.mean[r] : 0.0f), rstd = set1(a.rstd[r]);
    Vec sum = _mm512_setzero_ps(), sum_normed = _mm512_setzero_ps();
    for (int64_t c = 0; c < a.C; c += kLanes) {
      const Mask m = first_lanes(a.C - c);
      const Vec d = load(dy + c, m), g = _mm512_mul_ps(d, load(a.weight + c, m));
      const Vec normed = _mm512_mul_ps(_mm512_sub_ps(load(h + c, m), mean), rstd);
      sum = _mm512_add_ps(sum, g);
      sum_normed = fma(g, normed, sum_normed);
      store(dweight + c, fma(d, normed, load(dweight + c, m)), m);
      store(dbias + c, _mm512_add_ps(d, load(dbias + c, m)), m);
    }
    const Vec mean_g = set1(a.mean ? _mm512_reduce_add_ps(sum) * per_column : 0.0f);
    const Vec mean_gn = set1(_mm512_reduce_add_ps(sum_normed) * per_column);
    for (int64_t c = 0; c < a.C; c += kLanes) {
      const Mask m = first_lanes(a.C - c);
      const Vec g = _mm512_mul_ps(load(dy + c, m), load(a.weight + c, m));
      const Vec normed = _mm512_mul_ps(_mm512_sub_ps(load(h + c, m), mean), rstd);
      const Vec centred = _mm512_sub_ps(_mm512_sub_ps(g, mean_g), _mm512_mul_ps(normed, mean_gn));
      const Vec added = dh ? load(dh + c, m) : _mm512_setzero_ps();
      store(a.dx + r * a.C + c, fma(centred, rstd, added), m);
    }
  }
}

template <typename T>
void run(const Backward<T>& a) {
  const int64_t chunks = (a.M + kChunk - 1) / kChunk;
  std::vector<float> parts(2 * chunks * a.C);
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t last = (i + 1) * kChunk < a.M ? (i + 1) * kChunk : a.M;
    rows(a, i * kChunk, last, parts.data() + 2 * i * a.C, parts.data() + (2 * i + 1) * a.C);
  }
  for (int64_t c = 0; c < a.C; ++c) {
    float weight = 0.0f, bias = 0.0f;
    for (int64_t i = 0; i < chunks; ++i) weight += parts[2 * i * a.C + c], bias += parts[(2 * i + 1) * a.C + c];
    a.dweight[c] = weight;
    if (a.dbias) a.dbias[c] = bias;
  }
}

}  // namespace
}  // namespace megakern
#endif

namespace megakern {
namespace {

void check(const char* op, int dtype, int64_t M, int64_t C, int threads) {
  require_dtype(op, dtype);
  require_positive(op, "M", M);
  require_positive(op, "C", C);
  require_positive(op, "threads", threads);
  require_addressable(op, M, C);
}

}  // namespace

void norm_forward(Address x, Address residual, Address weight, Address bias, Address h, Address y, Address mean,
                  Address rstd, int dtype, int64_t M, int64_t C, float eps, bool centre, int threads) {
  const char* op = "norm_forward";
  check(op, dtype, M, C, threads);
  const int size = element_size(dtype);
  require_address(op, "x", x, size);
  require_address(op, "weight", weight, 4);
  require_address(op, "y", y, size);
  require_address(op, "rstd", rstd, 4);
  if (residual) require_address(op, "residual", residual, size);
  if (bias) require_address(op, "bias", bias, 4);
  if (centre) require_address(op, "mean", mean, 4);
  require((residual != 0) == (h != 0), "norm_forward: h is written if and only if there is a residual");
  require_no_partial_overlap(op, "x", x, "y", y, M * C * size);
#if defined(__x86_64__)
  const auto call = [&](auto* first) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(first)>>;
    const auto tensor = [](Address a) { return reinterpret_cast<T*>(a); };
    const auto floats = [](Address a) { return reinterpret_cast<float*>(a); };
    run(Forward<T>{first, tensor(residual), floats(weight), floats(bias), tensor(h), tensor(y),
                   centre ? floats(mean) : nullptr, floats(rstd), M, C, eps, threads});
  };
  if (dtype == kBFloat16) return call(reinterpret_cast<const bf16*>(x));
  return call(reinterpret_cast<const float*>(x));
#else
  require(false, "norm_forward: compiled for x86-64 only");
#endif
}

void norm_backward(Address dy, Address dh, Address h, Address weight, Address mean, Address rstd, Address dx,
                   Address dweight, Address dbias, int dtype, int64_t M, int64_t C, bool centre, int threads) {
  const char* op = "norm_backward";
  check(op, dtype, M, C, threads);
  const int size = element_size(dtype);
  require_address(op, "dy", dy, size);
  require_address(op, "h", h, size);
  require_address(op, "weight", weight, 4);
  require_address(op, "rstd", rstd, 4);
  require_address(op, "dx", dx, size);
  require_address(op, "dweight", dweight, 4);
  if (dh) require_address(op, "dh", dh, size);
  if (dbias) require_address(op, "dbias", dbias, 4);
  if (centre) require_address(op, "mean", mean, 4);
  require_no_partial_overlap(op, "dy", dy, "dx", dx, M * C * size);
  require_no_partial_overlap(op, "h", h, "dx", dx, M * C * size);
#if defined(__x86_64__)
  const auto call = [&](auto* first) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(first)>>;
    const auto tensor = [](Address a) { return reinterpret_cast<T*>(a); };
    const auto floats = [](Address a) { return reinterpret_cast<float*>(a); };
    run(Backward<T>{first, tensor(dh), tensor(h), floats(weight), centre ? floats(mean) : nullptr, floats(rstd),
                    tensor(dx), floats(dweight), floats(dbias), M, C, threads});
  };
  if (dtype == kBFloat16) return call(reinterpret_cast<const bf16*>(dy));
  return call(reinterpret_cast<const float*>(dy));
#else
  require(false, "norm_backward: compiled for x86-64 only");
#endif
}

}  // namespace megakern
