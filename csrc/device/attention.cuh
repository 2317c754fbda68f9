// What forward pass, backward pass and decoding of attention share: which keys a query sees, how a product becomes a score,
// which probabilities dropout keeps, where a block of packed sequences lies. The math is in megakern/ops/attention.py.
// Scores carry log2(e), so that exponentials are powers of two.
#pragma once

#include <cstdlib>

#include "device/random.cuh"
#include "device/tensor_map.cuh"

namespace megakern {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kUnlimited = 1 << 29;  // a side of the window; sums of two still fit

// --- who sees whom: query t stands beside key t + offset, its own ---

struct AttentionMask {
  int S, offset;    // keys; S - T
  int left, right;  // keys before and after its own that a query sees

  MK_DEVICE int first_key(int query) const { return max(0, query + offset - left); }
  MK_DEVICE int behind_key(int query) const { return min(S, query + offset + right + 1); }
  MK_DEVICE int first_query(int key) const { return max(0, key - offset - right); }
  MK_DEVICE int behind_query(int key, int T) const { return min(T, key - offset + left + 1); }
};

inline int window_side(std::int64_t side) { return side < 0 || side > kUnlimited ? kUnlimited : int(side); }

// --- scores ---

struct AttentionScoring {
  float scale;          // without a cap scale log2(e), else scale / cap
  float cap;            // cap log2(e); 0: none
  const float* slopes;  // of ALiBi, or null
  std::int64_t slope_stride;
  std::uint64_t seed_key;
  std::int64_t first_sample, first_head;
  int threshold;  // kDropNothing, or that of keep()
  float kept;     // 1 / (1 - p)

  // In powers of two, a key of distance.
  MK_DEVICE float slope(int sample, int head) const {
    return slopes == nullptr ? 0.0f : slopes[sample * slope_stride + head] * kLog2E;
  }
  // The dropout key of a head; each query's is fold(head_key, query), its columns are the keys of attention.
  MK_DEVICE std::uint64_t head_key(int sample, int head) const {
    return fold(fold(seed_key, first_sample + sample), first_head + head);
  }
};

constexpr int kDropNothing = INT32_MIN;

inline AttentionScoring attention_scoring(float scale, const AttentionFeatures& f) {
  const float unit = f.softcap > 0 ? 1.0f / f.softcap : kLog2E;
  return {scale * unit,   f.softcap * kLog2E, f.slopes, f.slope_stride, mix(std::uint64_t(f.seed)),
          f.first_sample, f.first_head,       f.threshold, f.kept};
}

// tanh(x) to about 1e-7, absolute: tanh.approx is off by up to 2^-11, which a cap of 50 makes 2 % of a probability.
MK_DEVICE float bend(float x) { return 1.0f - 2.0f * rcp_approx(1.0f + exp2_approx(x * (2 * kLog2E))); }

// Products of queries (rows) and keys, a fragment (fragment.cuh), become scores. Of this thread's two rows: own keys and
// slopes; key: of s[0].
template <int N>
MK_DEVICE void score_fragment(float (&s)[N], const AttentionScoring& f, const int (&own)[2], const float (&slope)[2],
                              int key) {
  if (f.cap > 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = bend(s[i] * f.scale) * f.cap;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] *= f.scale;
  }
  if (f.slopes != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int h = i / 2 % 2;
      s[i] -= slope[h] * float(abs(key + 8 * (i / 4) + i % 2 - own[h]));
    }
  }
}

// The lowest n bits, of which up to 31 count.
MK_DEVICE std::uint32_t low_bits(int n) { return (1u << min(max(n, 0), 31)) - 1; }

// Keys outside of [first, behind) of each of the two rows get -inf. A bit for every eighth column: tests of bits are half
// the instructions of comparisons with two ends.
template <int N>
MK_DEVICE void mask_fragment(float (&s)[N], const int (&first)[2], const int (&behind)[2], int key) {
  static_assert(N / 4 < 32);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const std::uint32_t seen = low_bits((behind[h] - key - j + 7) >> 3) & ~low_bits((first[h] - key - j + 7) >> 3);
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        if ((seen >> i & 1) == 0) s[4 * i + 2 * h + j] = -INFINITY;
      }
    }
  }
}

// A maximum is kept until one is found that is 2^8 times larger, as probabilities of up to 256 are as exact as those up to
// 1: then sums are seldom to be scaled (FlashAttention-4's idea). Each row decides for itself.
constexpr float kSlack = 8;

// One step of the softmax of two rows: s = 2^(s unit - most), the base and the sum so far (sums of this thread's columns
// alone), and the factors of what was made under the base before, exactly 1 where it is kept.
template <int N>
MK_DEVICE void soften_fragment(float (&s)[N], float unit, float (&most)[2], float (&sum)[2], float (&fade)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float peak = most[h];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) peak = fmaxf(peak, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
    peak = fmaxf(peak, shuffle_xor(peak, 1));
    peak = fmaxf(peak, shuffle_xor(peak, 2));
    const bool rises = (peak - most[h]) * unit > kSlack;  // from -inf too; not where both are -inf
    const float next = rises ? peak : most[h], base = next == -INFINITY ? 0.0f : next * unit;
    fade[h] = rises ? exp2_approx(most[h] * unit - base) : 1.0f;
    most[h] = next;
    float total = 0;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& value = s[4 * i + 2 * h + j];
        value = exp2_approx(fmaf(value, unit, -base));
        total += value;
      }
    }
    sum[h] = sum[h] * fade[h] + total;
  }
}

// Dropped probabilities become 0. The others count 1 / (1 - p) in the end.
template <int N>
MK_DEVICE void drop_fragment(float (&s)[N], const std::uint64_t (&row_key)[2], int threshold, int key) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (!keep(row_key[i / 2 % 2], std::uint32_t(key + 8 * (i / 4) + i % 2), threshold)) s[i] = 0;
  }
}

// --- packed sequences ---

// A block of `size` rows of one sequence, on the side of `offsets`; the other side is that of `others`. Sequence i owns the
// blocks from offsets[i] / size + i on, at least as many as it has, so that total / size + count are enough for all.
struct AttentionSequence {
  int sample, first;         // of the block in the sequence; not below `length`: nothing to do
  int start, length;         // of the sequence
  int other_start, other_length;

  MK_DEVICE AttentionSequence(const int* offsets, const int* others, int count, int block, int size) {
    int low = 0, above = count;
    while (above - low > 1) {
      const int middle = (low + above) / 2;
      if (offsets[middle] / size + middle <= block) low = middle;
      else above = middle;
    }
    sample = low, start = offsets[low], length = offsets[low + 1] - start;
    first = (block - start / size - low) * size;
    other_start = others[low], other_length = others[low + 1] - other_start;
  }
};

// --- boxes of one head: 64 columns and `rows` tokens of x (B, T, H, D), packed (T, H, D) ---

// Packed: dimension 1 are the rows of a box, dimension 2 begins `rows` tokens before x and goes token by token too. A box
// that begins at rows - n in the one and at the token behind its n rows in the other has these n; the rest is outside
// of dimension 1: read as zero, never written, whatever the next sequence has there.
inline TensorMap head_map(const void* x, Dtype dtype, std::int64_t B, std::int64_t T, std::int64_t H, std::int64_t D,
                          const AttentionStrides& by, int rows, bool packed) {
  const std::uint32_t box[] = {64, std::uint32_t(rows), 1, 1};
  const std::uint64_t token = std::uint64_t(by.token) * 2, head = std::uint64_t(by.head) * 2;
  if (packed) {
    const std::uint64_t sizes[] = {std::uint64_t(D), std::uint64_t(rows), std::uint64_t(T + rows), std::uint64_t(H)};
    const std::uint64_t strides[] = {token, token, head};
    return tensor_map(static_cast<const char*>(x) - rows * std::int64_t(token), dtype, 4, sizes, strides, box, Swizzle::b128);
  }
  const std::uint64_t sizes[] = {std::uint64_t(D), std::uint64_t(T), std::uint64_t(H), std::uint64_t(B)};
  const std::uint64_t strides[] = {token, head, std::uint64_t(by.sample) * 2};
  return tensor_map(x, dtype, 4, sizes, strides, box, Swizzle::b128);
}

// Coordinates 1 to 3 of the box of `rows` tokens from `row` on, of a sample or of a sequence of `length` tokens.
struct HeadBox {
  int y, z, w;

  MK_DEVICE HeadBox(bool packed, int sample, int head, int start, int length, int row, int rows) {
    const int inside = min(rows, length - row);
    y = packed ? rows - inside : row;
    z = packed ? start + row + inside : head;
    w = packed ? head : sample;
  }
};

}  // namespace megakern
