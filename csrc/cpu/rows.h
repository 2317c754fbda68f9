// Products of a few rows with a weight that is read once: the blocks of 16 outputs of which they are made.
//
//     z (M, 16) = x (M, K) w (16, K)^T      M at most kMostRows; fp32 sums over k in an order that M does not change
//
// Such a product takes the time in which the weight comes from memory, so products are fp32 also for bf16 weights (they
// are exact there), and no AVX512-BF16 is asked for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "activation.h"

namespace megakern {
namespace {

constexpr int kMostRows = 8;
constexpr int64_t kBlock = kLanes;  // outputs

// How a weight is read: as it is, or fp32 that is rounded to bf16, for bf16 x.
struct Plain32 {
  using Stored = float;
};
struct Rounded32 {
  using Stored = float;
};
struct Plain16 {
  using Stored = bf16;
};

// x is widened once, and laid out as the weight's lanes come: of 32 bf16 first those with even index, then the others.
constexpr int64_t kStep = 2 * kLanes;
MEGAKERN_INLINE int64_t padded(int64_t K) { return (K + kStep - 1) / kStep * kStep; }

template <typename W, typename T>
void lay_out(const T* x, int64_t K, float* to) {
  for (int64_t k = 0; k < padded(K); k += kStep) {
    const Vec low = load(x + k, first_lanes(K - k));
    const Vec high = K - k > kLanes ? load(x + k + kLanes, first_lanes(K - k - kLanes)) : _mm512_setzero_ps();
    if constexpr (std::is_same_v<W, Plain16>) {
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
      store(to + k, _mm512_permutex2var_ps(low, even, high));
      store(to + k + kLanes, _mm512_permutex2var_ps(low, odd, high));
    } else {
      store(to + k, low);
      store(to + k + kLanes, high);
    }
  }
}

struct Pair {
  Vec a, b;
};

template <typename W>
MEGAKERN_INLINE Pair two(const typename W::Stored* w, int64_t left) {
  if constexpr (std::is_same_v<W, Plain16>) {
    const __m512i both = left >= kStep ? _mm512_loadu_si512(w)
                                       : _mm512_maskz_loadu_epi16((std::uint32_t(1) << left) - 1, w);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xFFFF0000)))};
  } else {
    Vec a = left >= kLanes ? load(w) : load(w, first_lanes(left));
    Vec b = left >= kStep ? load(w + kLanes) : left > kLanes ? load(w + kLanes, first_lanes(left - kLanes)) : set1(0);
    if constexpr (std::is_same_v<W, Rounded32>) {
      const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
      a = _mm512_castsi512_ps(_mm512_and_si512(rounded_bits(a), upper));
      b = _mm512_castsi512_ps(_mm512_and_si512(rounded_bits(b), upper));
    }
    return {a, b};
  }
}

// The sums of R rows of the weight with M of x, x_step floats apart.
template <typename W, int R, int M>
MEGAKERN_INLINE void dots(const typename W::Stored* const (&w)[R], int64_t K, const float* x, int64_t x_step,
                          float* sums) {
  Vec total[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_ps();
  constexpr int64_t kLine = 64 / sizeof(typename W::Stored);
  const auto add = [&](int64_t k, int64_t left) {
    for (int r = 0; r < R; ++r) {
      for (int64_t line = 0; line < kStep; line += kLine)
        _mm_prefetch(reinterpret_cast<const char*>(w[r] + k + line) + R * K * sizeof(typename W::Stored), _MM_HINT_T0);
      const Pair pair = two<W>(w[r] + k, left);
      for (int m = 0; m < M; ++m) {
        total[r][m] = fma(pair.a, load(x + m * x_step + k), total[r][m]);
        total[r][m] = fma(pair.b, load(x + m * x_step + k + kLanes), total[r][m]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) add(k, kStep);
  if (k < K) add(k, K - k);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[m * kBlock + r] = _mm512_reduce_add_ps(total[r][m]);
}

template <typename W, int M>
void block_sums_of(const typename W::Stored* w, int64_t rows, int64_t K, const float* x, int64_t x_step, float* sums) {
  constexpr int R = M <= 4 ? 4 : 2;  // as many sums as stay in registers
  for (int64_t first = 0; first < rows; first += R) {
    const typename W::Stored* each[R];
    for (int r = 0; r < R; ++r) each[r] = w + std::min(first + r, rows - 1) * K;
    dots<W, R, M>(each, K, x, x_step, sums + first);
  }
}

// sums (M, kBlock) of `rows` <= kBlock rows of the weight; what is behind them has no meaning.
template <typename W>
void block_sums(const typename W::Stored* w, int64_t rows, int64_t K, const float* x, int64_t x_step, int M,
                float* sums) {
  switch (M) {
    case 1: return block_sums_of<W, 1>(w, rows, K, x, x_step, sums);
    case 2: return block_sums_of<W, 2>(w, rows, K, x, x_step, sums);
    case 3: return block_sums_of<W, 3>(w, rows, K, x, x_step, sums);
    case 4: return block_sums_of<W, 4>(w, rows, K, x, x_step, sums);
    case 5: return block_sums_of<W, 5>(w, rows, K, x, x_step, sums);
    case 6: return block_sums_of<W, 6>(w, rows, K, x, x_step, sums);
    case 7: return block_sums_of<W, 7>(w, rows, K, x, x_step, sums);
    default: return block_sums_of<W, 8>(w, rows, K, x, x_step, sums);
  }
}

template <Accuracy accuracy>
MEGAKERN_INLINE Vec activate(int kind, Vec x) {
  switch (kind) {
    case kGelu: return activate<kGelu, accuracy>(x);
    case kGeluTanh: return activate<kGeluTanh, accuracy>(x);
    case kReluSquared: return activate<kReluSquared, accuracy>(x);
    case kSilu: return activate<kSilu, accuracy>(x);
    default: return x;
  }
}

// The blocks of N outputs that thread `id` of `count` makes: [first, last).
struct Share {
  int64_t first, last;
  Share(int64_t items, int id, int count) : first(items * id / count), last(items * (id + 1) / count) {}
};

// y (M, N) = act(x w^T + bias) + residual for this thread's share of the outputs; x as lay_out leaves it, its rows
// padded(K) apart. pre, if there is one, gets what the activation reads. bias is V: T or fp32; y may be the residual.
template <typename W, typename T, typename V>
void product_share(const typename W::Stored* w, const V* bias, int64_t N, int64_t K, const float* x, int M,
                   int activation, const T* residual, T* pre, T* y, int id, int count) {
  alignas(64) float sums[kMostRows * kBlock];
  const Share share((N + kBlock - 1) / kBlock, id, count);
  for (int64_t n = share.first * kBlock; n < std::min(share.last * kBlock, N); n += kBlock) {
    const int64_t rows = std::min(kBlock, N - n);
    const Mask mask = first_lanes(rows);
    block_sums<W>(w + n * K, rows, K, x, padded(K), M, sums);
    const Vec added = bias ? load(bias + n, mask) : _mm512_setzero_ps();
    for (int m = 0; m < M; ++m) {
      const Vec sum = _mm512_add_ps(load(sums + m * kBlock), added);
      if (pre) store(pre + m * N + n, sum, mask);
      Vec z = activate<kAccuracyOf<T>>(activation, sum);
      if (residual) z = _mm512_add_ps(z, load(residual + m * N + n, mask));
      store(y + m * N + n, z, mask);
    }
  }
}

}  // namespace
}  // namespace megakern
