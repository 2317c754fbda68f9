// Cross-entropy of rows of logits (M, C): row losses, and d(row loss)/d(logits); writes = . Math, options and the meaning
// of `real`, `start` and `vocab_size`: megakern/ops/cross_entropy.py.
//
// All sums are relative to a `peak`, so that none loses digits to the size of the logits. While a thread reads, its peak may
// be up to kSlack below the largest logit it has seen: it moves seldom then. In the end it is the maximum of the row.
//
// rows, parts          a block reads its rows once, 16 bytes a thread at a time. An ignored row is not read. Either a block a
//                      row, or as many as run at once, which read ahead into shared memory.
// gradient             one block a piece of a row, from its lse; `out` may be the logits.
// loss_and_gradient    one read and one write: a block walks whole rows, and keeps a row on chip between the loss and the
//                      gradient: `held` chunks of 16 bytes a thread in registers, `kept` in shared memory; what does not
//                      fit is read again. While it writes a row's gradient it fetches the next row into the space that
//                      falls free, so that the memory always has work. A thread sees no chunk but its own: the only
//                      barriers are those of the sums.
// scale                x = factor x, where the factor, read on the device, is not 1: for a gradient made before its scale.
// shift, finish        one thread a row, before and behind the SUM over the ranks of a vocabulary in parts.
//
// Limits: C below 2^31; rows at any address and distance; no atomics, so that results repeat bit for bit.
#include "device/checks.h"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/span.cuh"

namespace megakern {
namespace {

constexpr int kThreads = 512;       // at most
constexpr int kBatch = 4;           // chunks a thread reads before it uses the first: 64 bytes in flight
constexpr int kPiece = 2 * kBatch;  // chunks a thread of the gradient kernel
constexpr int kPieceThreads = 256;
constexpr int kHeld = 10;   // chunks in registers for rows that shared memory cannot hold: 40 of 128 registers
constexpr int kRing = 8;    // chunks a thread that are on their way in the ring kernel
constexpr int kGroups = 8;  // parts of a row that arrive one after another

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLowest = -3.402823466e38f;  // the peak of a row of -inf, or of nothing but padding
constexpr float kSlack = 8.0f;

// --- kernels ---

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

// Where the loss of rows goes, or their parts for the ranks to combine; the others are null.
struct RowOutputs {
  float *loss, *lse, *peaks, *sums;
};

// Finishes a row whose chunks this thread has seen: its edge, the sums over the block, the outputs.
template <class T>
MK_DEVICE void finish_row(const CrossEntropy& p, const RowOutputs& to, int64_t index, const Coming<T>& row, Seen seen,
                          float edge, float at_target, bool smooth, Scratch& scratch) {
  if (row.target == p.ignore_index) {
    seen.peak = 0.0f;
    seen.sum = 1.0f;
  } else {
    if (int(threadIdx.x) < row.span.edge) seen.absorb(filled<float, 1>(edge), smooth);
    seen = scratch.combine(seen);
    if (own_column(row.target, p) >= 0) at_target -= seen.peak;
  }
  if (threadIdx.x != 0) return;
  if (to.loss) {
    const LossOfRow result = loss_of_row(seen.peak, logf(seen.sum), at_target, seen.total, row.target, p);
    to.loss[index] = result.loss;
    to.lse[index] = result.lse;
  } else {
    to.peaks[index] = seen.peak;
    to.sums[index] = seen.sum;
    to.sums[p.M + index] = at_target;
    if (smooth) to.sums[2 * p.M + index] = seen.total;
  }
}

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

// One block a row.
template <class T>
MK_KERNEL __launch_bounds__(kThreads, 2) void rows_kernel(CrossEntropy p, RowOutputs to) {
  SharedMemory shared;
  Scratch scratch(shared);
  const bool smooth = p.label_smoothing > 0.0f;
  const Coming<T> row(p, blockIdx.x, p.targets[blockIdx.x]);
  const float edge = edge_of(row), at_target = logit_of_target(p, row);
  Seen seen;
  each_chunk(row.span, 0, row.span.chunks,
             [&](int, const Words& chunk) { seen.absorb(floats_of<T>(chunk), smooth); });
  finish_row(p, to, blockIdx.x, row, seen, edge, at_target, smooth, scratch);
}

// A block walks many rows, kRing chunks a thread ahead of its sums: across the ends of rows, and while the block waits for
// all its threads.
template <class T>
MK_KERNEL __launch_bounds__(kThreads, 2) void ring_kernel(CrossEntropy p, RowOutputs to) {
  SharedMemory shared;
  Scratch scratch(shared);
  const int step = int(blockDim.x), me = int(threadIdx.x);
  Words* const ring = shared.take<Words>(kRing * step) + me;
  const bool smooth = p.label_smoothing > 0.0f;

  int64_t ahead_index = blockIdx.x;
  Coming<T> ahead(p, ahead_index, target_of(p, ahead_index));
  int64_t behind_ahead = target_of(p, ahead_index + gridDim.x);
  int ahead_chunk = 0;
  const auto fetch = [&](Words* slot) {  // the next chunk in line, if any
    while (ahead_chunk >= ahead.span.chunks && ahead_index < p.M) {
      ahead_index += gridDim.x;
      ahead = Coming<T>(p, ahead_index, behind_ahead);
      behind_ahead = target_of(p, ahead_index + gridDim.x);
      ahead_chunk = 0;
    }
    if (ahead_chunk + me < ahead.span.chunks) cp_async<16>(slot, ahead.span.chunk(ahead_chunk + me));
    cp_async_commit();
    ahead_chunk += step;
  };
  for (int slot = 0; slot < kRing; ++slot) fetch(ring + slot * step);

  int slot = 0;
  int64_t target = target_of(p, blockIdx.x);
  for (int64_t index = blockIdx.x; index < p.M; index += gridDim.x) {
    const Coming<T> row(p, index, target);
    target = target_of(p, index + gridDim.x);
    const float edge = edge_of(row), at_target = logit_of_target(p, row);
    Seen seen;
    for (int chunk = 0; chunk < row.span.chunks; chunk += step) {
      cp_async_wait<kRing - 1>();
      Words* const here = ring + slot * step;
      if (chunk + me < row.span.chunks) seen.absorb(floats_of<T>(load<4>(here->values)), smooth);
      fetch(here);
      slot = slot + 1 < kRing ? slot + 1 : 0;
    }
    finish_row(p, to, index, row, seen, edge, at_target, smooth, scratch);
  }
  cp_async_wait<0>();
}

MK_KERNEL __launch_bounds__(kPieceThreads) void shift_kernel(CrossEntropy p, const float* peaks, const float* highest,
                                                        float* sums) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.M) return;
  const float move = peaks[row] - highest[row];
  sums[row] *= exp2_approx(move * kLog2e);
  if (own_column(p.targets[row], p) >= 0) sums[p.M + row] += move;
  if (p.label_smoothing > 0.0f && p.real > 0) sums[2 * p.M + row] = fmaf(move, float(p.real), sums[2 * p.M + row]);
}

MK_KERNEL __launch_bounds__(kPieceThreads) void finish_kernel(CrossEntropy p, const float* highest, const float* sums,
                                                         float* loss, float* lse) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.M) return;
  const float total = p.label_smoothing > 0.0f ? sums[2 * p.M + row] : 0.0f;
  const LossOfRow result =
      loss_of_row(highest[row], logf(sums[row]), sums[p.M + row], total, p.targets[row], p);
  loss[row] = result.loss;
  lse[row] = result.lse;
}

template <class T>
MK_KERNEL __launch_bounds__(kPieceThreads, 4) void gradient_kernel(CrossEntropy p, const float* lse, const float* scale,
                                                              int64_t scale_stride, void* out, int64_t out_stride,
                                                              unsigned across) {
  const int64_t row = blockIdx.x / across, target = p.targets[row];
  const int piece = int(blockIdx.x % across);
  const int own = own_column(target, p);
  const Span<T> span(static_cast<const T*>(p.logits) + row * p.stride, int(p.real));
  const OutRow<T> to(static_cast<T*>(out) + row * out_stride, span);
  const int first = piece * kPiece * int(blockDim.x), behind = first + kPiece * int(blockDim.x);
  const int last = behind < span.chunks ? behind : span.chunks;
  if (piece == 0) to.pad(int(p.real), int(p.C));
  if (target == p.ignore_index) {
    const auto zeros = filled<T, Span<T>::N>(from_float<T>(0.0f));
    for (int k = first + int(threadIdx.x); k < last; k += int(blockDim.x)) to.store(span.first(k), zeros);
    if (piece == 0 && int(threadIdx.x) < span.edge) to.data[span.at_edge(threadIdx.x)] = zeros[0];
    return;
  }
  const float row_lse = lse[row];
  const GradientOfRow gradient(scale ? scale[row * scale_stride] : 1.0f, row_lse, 1.0f, row_lse, p);
  each_chunk(span, first, last,
             [&](int k, const Words& chunk) {
               to.store(span.first(k), gradient.template chunk<T>(chunk, span.first(k), own));
             });
  if (piece == 0 && int(threadIdx.x) < span.edge) {
    const int column = span.at_edge(threadIdx.x);
    to.data[column] = from_float<T>(gradient(to_float(span.data[column]), column == own));
  }
}

// Waits until the groups of a row up to `group` are here.
MK_DEVICE void wait_for(int group) {
  static_assert(kGroups == 8);
  switch (group) {
    case 0: return cp_async_wait<7>();
    case 1: return cp_async_wait<6>();
    case 2: return cp_async_wait<5>();
    case 3: return cp_async_wait<4>();
    case 4: return cp_async_wait<3>();
    case 5: return cp_async_wait<2>();
    case 6: return cp_async_wait<1>();
    default: return cp_async_wait<0>();
  }
}

template <class T, int HELD>
MK_KERNEL __launch_bounds__(kThreads, HELD > 0 ? 1 : 2) void loss_and_gradient_kernel(CrossEntropyLossAndGradient p) {
  SharedMemory shared;
  Scratch scratch(shared);
  const int step = int(blockDim.x), me = int(threadIdx.x), per_group = ceil_div(p.kept, kGroups);
  const int first_slot = HELD * step + me, rest = (HELD + p.kept) * step;  // chunks from `rest` on do not fit
  Words* const slots = shared.take<Words>(p.kept * step) + me;
  Words held[HELD > 0 ? HELD : 1];
  T edge = from_float<T>(0.0f);
  const bool smooth = p.rows.label_smoothing > 0.0f;

  const auto fetch_held = [&](const Coming<T>& row, int j) {
    if (j * step + me < row.span.chunks) held[j] = read(row.span.chunk(j * step + me));
  };
  const auto fetch_slot = [&](const Coming<T>& row, int k, Words* slot) {
    if (k < row.span.chunks) cp_async<16>(slot, row.span.chunk(k));
  };
  const auto fetch_edge = [&](const Coming<T>& row) {
    if (me < row.span.edge) edge = row.span.data[row.span.at_edge(me)];
  };
  // f(k, slot) for this thread's slots, and their chunks; before(group) and after() around each group of them.
  const auto each_slot = [&](auto before, auto f, auto after) {
    Words* slot = slots;
    int k = first_slot;
    for (int group = 0; group < kGroups; ++group) {
      before(group);
      const int left = p.kept - group * per_group;
      for (int j = left < per_group ? left : per_group; j > 0; --j, slot += step, k += step) f(k, slot);
      after();
    }
  };

  Coming<T> row(p.rows, blockIdx.x, target_of(p.rows, blockIdx.x));
#pragma unroll
  for (int j = 0; j < HELD; ++j) fetch_held(row, j);
  fetch_edge(row);
  each_slot([](int) {}, [&](int k, Words* slot) { fetch_slot(row, k, slot); }, [] { cp_async_commit(); });

  for (int64_t index = blockIdx.x; index < p.rows.M; index += gridDim.x) {
    const int64_t next_target = target_of(p.rows, index + gridDim.x);
    const int own = own_column(row.target, p.rows);
    const float scale = p.scale ? p.scale[index * p.scale_stride] : 1.0f;
    float at_target = logit_of_target(p.rows, row);  // before anything is written over it

    Seen seen;
    const auto absorb = [&](int, const Words& chunk) { seen.absorb(floats_of<T>(chunk), smooth); };
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
      if (j * step + me < row.span.chunks) absorb(j, held[j]);
    }
    each_slot([](int group) { wait_for(group); },
              [&](int k, Words* slot) {
                if (k < row.span.chunks) absorb(k, load<4>(slot->values));
              },
              [] {});
    each_chunk(row.span, rest, row.span.chunks, absorb);
    if (me < row.span.edge) seen.absorb(filled<float, 1>(to_float(edge)), smooth);
    seen = scratch.combine(seen);
    if (own >= 0) at_target -= seen.peak;
    const LossOfRow result = loss_of_row(seen.peak, logf(seen.sum), at_target, seen.total, row.target, p.rows);
    if (me == 0) p.loss[index] = result.loss;

    // The gradient, and on its heels the next row. What does not fit comes first: it was read last.
    const GradientOfRow gradient(scale, seen.peak, 1.0f / seen.sum, result.lse, p.rows);
    const OutRow<T> out(static_cast<T*>(p.out) + index * p.out_stride, row.span);
    const Coming<T> next(p.rows, index + gridDim.x, next_target);
    const auto emit = [&](int k, const Words& chunk) {
      out.store(row.span.first(k), gradient.template chunk<T>(chunk, row.span.first(k), own));
    };
    each_chunk(row.span, rest, row.span.chunks, emit);
    if (me < row.span.edge) {
      const int column = row.span.at_edge(me);
      out.data[column] = from_float<T>(gradient(to_float(edge), column == own));
    }
    fetch_edge(next);
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
      if (j * step + me < row.span.chunks) emit(j * step + me, held[j]);
      fetch_held(next, j);
    }
    each_slot([](int) {},
              [&](int k, Words* slot) {
                if (k < row.span.chunks) emit(k, load<4>(slot->values));
                fetch_slot(next, k, slot);
              },
              [] { cp_async_commit(); });
    out.pad(row.target == p.rows.ignore_index ? 0 : int(p.rows.real), int(p.rows.C));
    row = next;
  }
  cp_async_wait<0>();
}

template <class T>
MK_KERNEL __launch_bounds__(kPieceThreads) void scale_kernel(T* x, int64_t count, const float* factor) {
  const float scale = *factor;
  if (scale == 1.0f) return;
  const int64_t piece = int64_t(kPiece) * kPieceThreads * kVector<T>, start = blockIdx.x * piece, left = count - start;
  x += start;
  const Span<T> span(x, int(left < piece ? left : piece));
  each_chunk(span, 0, span.chunks, [&](int k, const Words& chunk) {
    Vector<float, kVector<T>> values = floats_of<T>(chunk);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) values[i] *= scale;
    store_once(x + span.first(k), from_float<T>(values));
  });
  if (int(threadIdx.x) < span.edge) {
    T& value = x[span.at_edge(threadIdx.x)];
    value = from_float<T>(to_float(value) * scale);
  }
}

// --- launchers ---

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

void launch_rows(Checks& check, const CrossEntropy& p, const RowOutputs& to, int threads, int blocks, Place place) {
  check.size("threads", threads, kWarp, kThreads);
  check.require(threads % kWarp == 0, "threads must be whole warps");
  check.size("blocks", blocks, 0, kMostBlocks);
  const std::size_t ring = std::size_t(kRing) * threads * 16;
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (blocks) MK_LAUNCH(ring_kernel<T>, dim3(unsigned(blocks < p.M ? blocks : p.M)), dim3(threads), Scratch::bytes + ring, place, p, to);
    else MK_LAUNCH(rows_kernel<T>, dim3(unsigned(p.M)), dim3(threads), Scratch::bytes, place, p, to);
  });
}

}  // namespace

void cross_entropy_rows(const CrossEntropyRows& p, Place place) {
  Checks check("cross_entropy_rows");
  check_rows(check, p.rows);
  check.writes("loss", p.loss, Dtype::f32, p.rows.M);
  check.writes("lse", p.lse, Dtype::f32, p.rows.M);
  launch_rows(check, p.rows, {p.loss, p.lse, nullptr, nullptr}, p.threads, p.blocks, place);
}

void cross_entropy_parts(const CrossEntropyParts& p, Place place) {
  Checks check("cross_entropy_parts");
  check_rows(check, p.rows);
  check.writes("peaks", p.peaks, Dtype::f32, p.rows.M);
  check.writes("sums", p.sums, Dtype::f32, (p.rows.label_smoothing > 0 ? 3 : 2) * p.rows.M);
  launch_rows(check, p.rows, {nullptr, nullptr, p.peaks, p.sums}, p.threads, p.blocks, place);
}

void cross_entropy_shift(const CrossEntropyShift& p, Place place) {
  Checks check("cross_entropy_shift");
  check_rows(check, p.rows);
  check.reads("peaks", p.peaks, Dtype::f32, p.rows.M);
  check.reads("highest", p.highest, Dtype::f32, p.rows.M);
  check.writes("sums", p.sums, Dtype::f32, (p.rows.label_smoothing > 0 ? 3 : 2) * p.rows.M);
  const int64_t blocks = ceil_div<int64_t>(p.rows.M, kPieceThreads);
  MK_LAUNCH(shift_kernel, dim3(check.blocks(blocks)), dim3(kPieceThreads), 0, place, p.rows, p.peaks, p.highest, p.sums);
}

void cross_entropy_finish(const CrossEntropyFinish& p, Place place) {
  Checks check("cross_entropy_finish");
  check_rows(check, p.rows);
  check.reads("highest", p.highest, Dtype::f32, p.rows.M);
  check.reads("sums", p.sums, Dtype::f32, (p.rows.label_smoothing > 0 ? 3 : 2) * p.rows.M);
  check.writes("loss", p.loss, Dtype::f32, p.rows.M);
  check.writes("lse", p.lse, Dtype::f32, p.rows.M);
  const int64_t blocks = ceil_div<int64_t>(p.rows.M, kPieceThreads);
  MK_LAUNCH(finish_kernel, dim3(check.blocks(blocks)), dim3(kPieceThreads), 0, place, p.rows, p.highest, p.sums, p.loss,
            p.lse);
}

void cross_entropy_gradient(const CrossEntropyGradient& p, Place place) {
  Checks check("cross_entropy_gradient");
  check_rows(check, p.rows);
  check.reads("lse", p.lse, Dtype::f32, p.rows.M);
  if (p.scale) check.reads("scale", p.scale, Dtype::f32, p.rows.M, 1, p.scale_stride);
  check.writes("out", p.out, p.rows.dtype, p.rows.M, p.rows.C, p.out_stride, Alias::whole);
  with_dtype(p.rows.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t across = ceil_div<int64_t>(p.rows.real / kVector<T> + 1, kPiece * kPieceThreads);
    MK_LAUNCH(gradient_kernel<T>, dim3(check.blocks(p.rows.M * across)), dim3(kPieceThreads), 0, place, p.rows, p.lse,
              p.scale, p.scale_stride, p.out, p.out_stride, unsigned(across));
  });
}

void cross_entropy_loss_and_gradient(const CrossEntropyLossAndGradient& p, Place place) {
  Checks check("cross_entropy_loss_and_gradient");
  check_rows(check, p.rows);
  if (p.scale) check.reads("scale", p.scale, Dtype::f32, p.rows.M, 1, p.scale_stride);
  check.writes("loss", p.loss, Dtype::f32, p.rows.M);
  check.writes("out", p.out, p.rows.dtype, p.rows.M, p.rows.C, p.out_stride, Alias::whole);
  check.size("threads", p.threads, kWarp, kThreads);
  check.require(p.threads % kWarp == 0, "threads must be whole warps");
  check.require(p.held == 0 || p.held == kHeld, "held must be 0 or " + std::to_string(kHeld));
  check.size("kept", p.kept, 0, 1024);
  check.size("blocks", p.blocks, 1, kMostBlocks);
  const std::size_t bytes = Scratch::bytes + std::size_t(p.kept) * p.threads * 16;
  const unsigned blocks = unsigned(p.blocks < p.rows.M ? p.blocks : p.rows.M);
  with_dtype(p.rows.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.held) MK_LAUNCH(loss_and_gradient_kernel<T, kHeld>, dim3(blocks), dim3(p.threads), bytes, place, p);
    else MK_LAUNCH(loss_and_gradient_kernel<T, 0>, dim3(blocks), dim3(p.threads), bytes, place, p);
  });
}

void scale_unless_one(const ScaleUnlessOne& p, Place place) {
  Checks check("scale_unless_one");
  check.floating(p.dtype);
  check.size("count", p.count);
  check.reads("factor", p.factor, Dtype::f32, 1);
  check.writes("x", p.x, p.dtype, p.count);
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t blocks = ceil_div<int64_t>(p.count, int64_t(kPiece) * kPieceThreads * kVector<T>);
    MK_LAUNCH(scale_kernel<T>, dim3(check.blocks(blocks)), dim3(kPieceThreads), 0, place, static_cast<T*>(p.x), p.count,
              p.factor);
  });
}

}  // namespace megakern
