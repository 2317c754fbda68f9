// What the kernels of cross_entropy.cu and cross_entropy_fused.cu share: the sums over a row, its loss, its gradient.
//
// All sums are relative to a `peak`, so that none loses digits to the size of the logits. While a thread reads, its peak may
// be up to kSlack below the largest logit it has seen: it moves seldom then. In the end it is the maximum of the row.
#pragma once

#include "device/checks.h"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/span.cuh"

namespace megakern {
namespace {

constexpr int kThreads = 512;  // at most
constexpr int kBatch = 4;      // chunks a thread reads before it uses the first: 64 bytes in flight
constexpr int kPiece = 2 * kBatch, kPieceThreads = 256;  // of elementwise kernels: chunks a thread, threads of a block

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLowest = -3.402823466e38f;  // the peak of a row of -inf, or of nothing but padding
constexpr float kSlack = 8.0f;

// The 16 bytes of a chunk. On its way to its use it stays in words: as bf16 it would take twice the registers.
using Words = Vector<uint32_t, 4>;

template <class T>
MK_DEVICE Vector<float, kVector<T>> floats_of(const Words& words) {
  Vector<float, kVector<T>> out;
  if constexpr (std::is_same_v<T, bf16>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t halves[2] = {words[i] << 16, words[i] & 0xffff0000u};
      memcpy(&out[2 * i], halves, 8);
    }
    return out;
  } else {
    Vector<T, kVector<T>> chunk;
    memcpy(chunk.values, words.values, 16);
    return to_float(chunk);
  }
}

template <class T>
MK_DEVICE Words read(const T* address) {
  return load_once<4>(reinterpret_cast<const uint32_t*>(address));
}

// A tree of depth log2(N): a chain of N would leave the pipes waiting.
template <int N, class Combine>
MK_DEVICE float in_pairs(Vector<float, N> x, Combine combine) {
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) x[i] = combine(x[i], x[i + half]);
  }
  return x[0];
}

// What one thread, or one block, has seen of a row.
struct Seen {
  float top = kLowest, peak = kLowest;  // the maximum of x, and a value that is at most kSlack below it
  float sum = 0.0f;                     // of exp(x - peak)
  float total = 0.0f, count = 0.0f;     // sum and number of x - peak; for label smoothing alone

  template <int N>
  MK_DEVICE void absorb(const Vector<float, N>& x, bool smooth) {
    const float highest = in_pairs(x, Max{});
    top = fmaxf(top, highest);
    if (highest > peak + kSlack) rise(highest);
    Vector<float, N> d, power;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      d[i] = x[i] - peak;
      power[i] = exp2_approx(d[i] * kLog2e);
    }
    sum += in_pairs(power, Sum{});
    if (smooth) {
      total += in_pairs(d, Sum{});
      count += N;
    }
  }

  MK_DEVICE void rise(float higher) {
    sum *= exp2_approx((peak - higher) * kLog2e);
    if (count > 0.0f) total = fmaf(peak - higher, count, total);
    peak = higher;
  }
};

struct Pair {
  float a, b;
};
struct PairSum {
  MK_DEVICE Pair operator()(Pair x, Pair y) const { return {x.a + y.a, x.b + y.b}; }
};

struct Scratch {
  static constexpr std::size_t bytes = BlockScratch<float>::bytes + BlockScratch<Pair>::bytes;

  BlockScratch<float> peaks;
  BlockScratch<Pair> sums;

  MK_DEVICE explicit Scratch(SharedMemory& shared) : peaks(shared), sums(shared) {}

  // What all threads of the block have seen, in each of them; the peak is the maximum.
  MK_DEVICE Seen combine(Seen own) {
    Seen all;
    all.top = all.peak = block_max(own.top, peaks);
    own.rise(all.peak);
    const Pair both = block_reduce(Pair{own.sum, own.total}, PairSum{}, Pair{0.0f, 0.0f}, sums);
    all.sum = both.a;
    all.total = both.b;
    return all;
  }
};

// The column of a row's target on this rank, or -1.
MK_DEVICE int own_column(int64_t target, const CrossEntropy& p) {
  const int64_t column = target - p.start;
  return target != p.ignore_index && column >= 0 && column < p.real ? int(column) : -1;
}

struct LossOfRow {
  float loss, lse;
};

// log_sum, at_target, total: relative to peak.
MK_DEVICE LossOfRow loss_of_row(float peak, float log_sum, float at_target, float total, int64_t target,
                                const CrossEntropy& p) {
  if (target == p.ignore_index) return {0.0f, 0.0f};
  float loss = log_sum - at_target;
  if (p.label_smoothing > 0.0f) {
    const float uniform = log_sum - total / float(p.vocab_size);
    loss = (1.0f - p.label_smoothing) * loss + p.label_smoothing * uniform;
  }
  const float lse = peak + log_sum;
  loss += p.z_loss * lse * lse;
  return {target < 0 || target >= p.vocab_size ? NAN : loss, lse};
}

// g = probability exp(x - peak) - uniform, and at_target more in the target's column.
struct GradientOfRow {
  float probability, peak, uniform, at_target;

  MK_DEVICE GradientOfRow(float scale, float peak, float probability, float lse, const CrossEntropy& p)
      : probability(scale * (1.0f + 2.0f * p.z_loss * lse) * probability),
        peak(peak),
        uniform(scale * (p.label_smoothing / float(p.vocab_size))),
        at_target(scale * (p.label_smoothing - 1.0f)) {}

  MK_DEVICE float operator()(float x, bool target) const {
    const float gradient = fmaf(probability, exp2_approx((x - peak) * kLog2e), -uniform);
    return target ? gradient + at_target : gradient;
  }

  // Columns first .. first + N, of which `own` may be one.
  template <class T>
  MK_DEVICE Vector<T, kVector<T>> chunk(const Words& words, int first, int own) const {
    constexpr int N = kVector<T>;
    Vector<float, N> g = floats_of<T>(words);
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = (*this)(g[i], false);
    const unsigned at = unsigned(own) - unsigned(first);
    if (at < unsigned(N)) {  // one thread a row
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] += unsigned(i) == at ? at_target : 0.0f;
    }
    return from_float<T>(g);
  }
};

// A row of the output, which need not be aligned as the row of logits is.
template <class T>
struct OutRow {
  T* data;
  bool aligned;  // at the chunks of the logits

  MK_DEVICE OutRow(T* data, const Span<T>& row)
      : data(data), aligned(reinterpret_cast<uintptr_t>(data + row.head) % 16 == 0) {}

  template <int N>
  MK_DEVICE void store(int column, const Vector<T, N>& v) const {
    if (aligned) {
      store_once(data + column, v);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) data[column + i] = v[i];
    }
  }

  // Zeros in the padding columns, by all threads of a block.
  MK_DEVICE void pad(int real, int C) const {
    for (int column = real + threadIdx.x; column < C; column += blockDim.x) data[column] = from_float<T>(0.0f);
  }
};

// f(k, chunk k) for chunks first + threadIdx.x, + blockDim.x, ... below last, kBatch of them read at a time.
template <class T, class F>
MK_DEVICE void each_chunk(const Span<T>& row, int first, int last, F f) {
  const int step = int(blockDim.x);
  int k = first + int(threadIdx.x);
  for (; k + (kBatch - 1) * step < last; k += kBatch * step) {
    Words chunk[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) chunk[j] = read(row.chunk(k + j * step));
#pragma unroll
    for (int j = 0; j < kBatch; ++j) f(k + j * step, chunk[j]);
  }
  for (; k < last; k += step) f(k, read(row.chunk(k)));
}

// A row on its way into a block. An ignored one, or one behind the last, brings nothing.
template <class T>
struct Coming {
  int64_t target;
  Span<T> span;

  MK_DEVICE Coming(const CrossEntropy& p, int64_t row, int64_t target)
      : target(target),
        span(static_cast<const T*>(p.logits) + row * p.stride, target != p.ignore_index ? int(p.real) : 0) {}
};

MK_DEVICE int64_t target_of(const CrossEntropy& p, int64_t row) { return row < p.M ? p.targets[row] : p.ignore_index; }

template <class T>
MK_DEVICE float edge_of(const Coming<T>& row) {
  const int e = int(threadIdx.x);
  return e < row.span.edge ? to_float(row.span.data[row.span.at_edge(e)]) : 0.0f;
}

template <class T>
MK_DEVICE float logit_of_target(const CrossEntropy& p, const Coming<T>& row) {
  const int own = own_column(row.target, p);
  return threadIdx.x == 0 && own >= 0 ? to_float(row.span.data[own]) : 0.0f;
}

void check_rows(Checks& check, const CrossEntropy& p) {
  check.floating(p.dtype);
  check.size("M", p.M, 0, kMostBlocks);
  check.size("C", p.C, 0, kInt32Max);
  check.size("real", p.real, 0, p.C);
  check.size("vocab_size", p.vocab_size, 1);
  check.size("start", p.start);
  check.reads("logits", p.logits, p.dtype, p.M, p.C, p.stride);
  check.reads("targets", p.targets, Dtype::i64, p.M);
}

}  // namespace
}  // namespace megakern
