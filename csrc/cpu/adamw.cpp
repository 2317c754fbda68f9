// AdamW, and the sum of squares of gradients, over many tensors in one call; megakern/ops/adamw.py has the formulas.
//
// adamw writes, in place, params, both moments, masters, and on request zeros over the gradients: each element is read
// once and written once. Threads take pieces of tensors. Params are fp32, or bf16 with a master: fp32, or the 16 bits
// that the param lacks. Arithmetic is fp32; moments in bf16 are rounded to nearest even, a param to nearest with ties
// away from zero, which is what the 16 bits undo. Sums of squares are made in fp64, piece by piece, and those of the
// pieces are added in order.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "checks.h"

namespace megakern {
namespace {

constexpr int64_t kPiece = 1 << 14;  // elements that a thread takes at a time

struct Piece {
  size_t tensor;
  int64_t first, last;
};

// The pieces of tensors that have so many elements.
[[maybe_unused]] std::vector<Piece> pieces_of(const std::vector<int64_t>& elements) {
  std::vector<Piece> pieces;
  for (size_t tensor = 0; tensor < elements.size(); ++tensor)
    for (int64_t first = 0; first < elements[tensor]; first += kPiece)
      pieces.push_back({tensor, first, std::min(first + kPiece, elements[tensor])});
  return pieces;
}

}  // namespace
}  // namespace megakern

#if defined(__x86_64__)
#include "simd.h"

namespace megakern {
namespace {

// Elements ahead that are fetched: the processor's own prefetching ends with each page of 4 KB.
constexpr int64_t kFetched = 512;

template <typename P, typename G, typename M, int master>
struct Update {  // of kLanes elements of one tensor
  P* param;
  G* grad;
  M *exp_avg, *exp_avg_sq;
  float* whole;        // the master, of kWhole
  std::uint16_t* low;  // its lower half, of kLowHalf
  Vec scale, decay, beta1, one_beta1, beta2, one_beta2, step_size, correction, eps;
  bool zero_grads;

  Update(const AdamwProblem& a, const AdamwTensors& x)
      : param(reinterpret_cast<P*>(x.param)), grad(reinterpret_cast<G*>(x.grad)),
        exp_avg(reinterpret_cast<M*>(x.exp_avg)), exp_avg_sq(reinterpret_cast<M*>(x.exp_avg_sq)),
        whole(reinterpret_cast<float*>(x.master)), low(reinterpret_cast<std::uint16_t*>(x.master)),
        scale(set1(a.scale)), decay(set1(a.decay)), beta1(set1(a.beta1)), one_beta1(set1(a.one_beta1)),
        beta2(set1(a.beta2)), one_beta2(set1(a.one_beta2)), step_size(set1(a.step_size)),
        correction(set1(a.correction)), eps(set1(a.eps)), zero_grads(a.zero_grads) {}

  MEGAKERN_INLINE Vec weight(int64_t i, Mask m) const {
    if constexpr (master == kWhole) return load(whole + i, m);
    if constexpr (master == kLowHalf) {
      const __m512i high = _mm512_castps_si512(load(param + i, m));
      const __m512i rest = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(m, low + i));
      return _mm512_castsi512_ps(_mm512_add_epi32(high, rest));
    }
    return load(param + i, m);
  }

  MEGAKERN_INLINE void put(int64_t i, Vec weight, Mask m) const {
    if constexpr (master == kOwn) return store(param + i, weight, m);
    const __m512i bits = _mm512_castps_si512(weight);
    if constexpr (master == kWhole) store(whole + i, weight, m);
    else _mm256_mask_storeu_epi16(low + i, m, _mm512_cvtepi32_epi16(bits));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
    _mm256_mask_storeu_epi16(param + i, m, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }

  MEGAKERN_INLINE void operator()(int64_t i, Mask m) const {
    const Vec g = _mm512_mul_ps(load(grad + i, m), scale);
    const Vec first = fma(one_beta1, g, _mm512_mul_ps(beta1, load(exp_avg + i, m)));
    const Vec second = fma(_mm512_mul_ps(one_beta2, g), g, _mm512_mul_ps(beta2, load(exp_avg_sq + i, m)));
    store(exp_avg + i, first, m);
    store(exp_avg_sq + i, second, m);
    const Vec change = _mm512_div_ps(first, fma(_mm512_sqrt_ps(second), correction, eps));
    put(i, _mm512_fnmadd_ps(step_size, change, _mm512_mul_ps(weight(i, m), decay)), m);
    if (zero_grads) store(grad + i, _mm512_setzero_ps(), m);
  }

  MEGAKERN_INLINE void fetch(int64_t i) const {
    const auto line = [](const auto* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); };
    line(param + i), line(grad + i), line(exp_avg + i), line(exp_avg_sq + i);
    if constexpr (master == kWhole) line(whole + i);
    if constexpr (master == kLowHalf) line(low + i);
  }

  void run(int64_t begin, int64_t end) const {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      fetch(i + kFetched);
      (*this)(i, Mask(0xFFFF));
    }
    if (i < end) (*this)(i, first_lanes(end - i));
  }
};

template <typename P, typename G, typename M, int master>
void update(const AdamwProblem& a, const std::vector<AdamwTensors>& tensors, const std::vector<Piece>& pieces) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic)
  for (size_t n = 0; n < pieces.size(); ++n) {
    const Piece& piece = pieces[n];
    Update<P, G, M, master>(a, tensors[piece.tensor]).run(piece.first, piece.last);
  }
}

template <typename T>
double squares(const T* x, int64_t first, int64_t last) {
  __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  const auto add = [&](Vec v) __attribute__((always_inline)) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    sums[0] = _mm512_fmadd_pd(low, low, sums[0]), sums[1] = _mm512_fmadd_pd(high, high, sums[1]);
  };
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) {
    _mm_prefetch(reinterpret_cast<const char*>(x + i + kFetched), _MM_HINT_T0);
    add(load(x + i));
  }
  if (i < last) add(load(x + i, first_lanes(last - i)));
  return _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1]));
}

}  // namespace
}  // namespace megakern
#endif

namespace megakern {
namespace {

void require_tensor(const char* op, const char* name, Address address, int64_t elements, int size) {
  require_address(op, name, address, size);
  require_positive(op, "the number of elements", elements);
  require_addressable(op, elements, 1);
}

}  // namespace

void adamw(const AdamwProblem& a, const std::vector<AdamwTensors>& tensors) {
  const char* op = "adamw";
  require_dtype(op, a.param_dtype);
  require_dtype(op, a.grad_dtype);
  require_dtype(op, a.moment_dtype);
  require_positive(op, "threads", a.threads);
  require(a.master >= kOwn && a.master <= kLowHalf,
          "adamw: master code must be 0 (none), 1 (fp32) or 2 (low half), got " + std::to_string(a.master));
  require((a.master == kOwn) == (a.param_dtype == kFloat32), "adamw: bf16 params have a master, fp32 ones have none");
  std::vector<int64_t> elements;
  for (const AdamwTensors& x : tensors) {
    require_tensor(op, "param", x.param, x.elements, element_size(a.param_dtype));
    require_tensor(op, "grad", x.grad, x.elements, element_size(a.grad_dtype));
    require_tensor(op, "exp_avg", x.exp_avg, x.elements, element_size(a.moment_dtype));
    require_tensor(op, "exp_avg_sq", x.exp_avg_sq, x.elements, element_size(a.moment_dtype));
    if (a.master != kOwn) require_tensor(op, "master", x.master, x.elements, a.master == kWhole ? 4 : 2);
    const Address all[] = {x.param, x.grad, x.exp_avg, x.exp_avg_sq, x.master};
    for (int i = 0; i < 5; ++i)
      for (int j = 0; j < i; ++j) require(all[i] != all[j], "adamw: two tensors of a param have one address");
    elements.push_back(x.elements);
  }
#if defined(__x86_64__)
  const std::vector<Piece> pieces = pieces_of(elements);
  const auto moments = [&](auto p, auto g, auto master) {
    using P = decltype(p);
    using G = decltype(g);
    if (a.moment_dtype == kBFloat16) return update<P, G, bf16, decltype(master)::value>(a, tensors, pieces);
    return update<P, G, float, decltype(master)::value>(a, tensors, pieces);
  };
  const auto grads = [&](auto p, auto master) {
    if (a.grad_dtype == kBFloat16) return moments(p, bf16(), master);
    return moments(p, float(), master);
  };
  switch (a.master) {
    case kWhole: return grads(bf16(), std::integral_constant<int, kWhole>());
    case kLowHalf: return grads(bf16(), std::integral_constant<int, kLowHalf>());
    default: return grads(float(), std::integral_constant<int, kOwn>());
  }
#else
  require(false, "adamw: compiled for x86-64 only");
#endif
}

double sum_of_squares(const std::vector<Elements>& tensors, int threads) {
  const char* op = "sum_of_squares";
  require_positive(op, "threads", threads);
  std::vector<int64_t> elements;
  for (const Elements& x : tensors) {
    require_dtype(op, x.dtype);
    require_tensor(op, "a tensor", x.data, x.count, element_size(x.dtype));
    elements.push_back(x.count);
  }
#if defined(__x86_64__)
  const std::vector<Piece> pieces = pieces_of(elements);
  std::vector<double> sums(pieces.size());
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (size_t n = 0; n < pieces.size(); ++n) {
    const Piece& piece = pieces[n];
    const Elements& x = tensors[piece.tensor];
    sums[n] = x.dtype == kBFloat16 ? squares(reinterpret_cast<const bf16*>(x.data), piece.first, piece.last)
                                   : squares(reinterpret_cast<const float*>(x.data), piece.first, piece.last);
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
#else
  require(false, "sum_of_squares: compiled for x86-64 only");
  return 0;
#endif
}

}  // namespace megakern
