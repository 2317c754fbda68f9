// Cross-entropy of rows of logits (M, C): row losses, and d(row loss)/d(logits) from them; writes = . Math, options and the
// meaning of `real`, `start` and `vocab_size`: megakern/ops/cross_entropy.py. Both at once: cross_entropy_fused.cu.
//
// rows, parts      a block reads a row once, 16 bytes a thread at a time. An ignored row is not read. Persistent blocks that
//                  read ahead into shared memory were slower (8192 x 131072 on an H200: 601 us against 474).
// gradient         one block a piece of a row, from its lse; `out` may be the logits.
// shift, finish    one thread a row, before and behind the SUM over the ranks of a vocabulary in parts.
//
// Limits: C below 2^31; rows at any address and distance; no atomics, so that results repeat bit for bit.
#include "cross_entropy.cuh"

namespace megakern {
namespace {

// --- kernels ---

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

// --- launchers ---

void launch_rows(Checks& check, const CrossEntropy& p, const RowOutputs& to, int threads, Place place) {
  check.size("threads", threads, kWarp, kThreads);
  check.require(threads % kWarp == 0, "threads must be whole warps");
  with_dtype(p.dtype, [&](auto t) {
    MK_LAUNCH(rows_kernel<decltype(t)>, dim3(unsigned(p.M)), dim3(threads), Scratch::bytes, place, p, to);
  });
}

}  // namespace

void cross_entropy_rows(const CrossEntropyRows& p, Place place) {
  Checks check("cross_entropy_rows");
  check_rows(check, p.rows);
  check.writes("loss", p.loss, Dtype::f32, p.rows.M);
  check.writes("lse", p.lse, Dtype::f32, p.rows.M);
  launch_rows(check, p.rows, {p.loss, p.lse, nullptr, nullptr}, p.threads, place);
}

void cross_entropy_parts(const CrossEntropyParts& p, Place place) {
  Checks check("cross_entropy_parts");
  check_rows(check, p.rows);
  check.writes("peaks", p.peaks, Dtype::f32, p.rows.M);
  check.writes("sums", p.sums, Dtype::f32, (p.rows.label_smoothing > 0 ? 3 : 2) * p.rows.M);
  launch_rows(check, p.rows, {nullptr, nullptr, p.peaks, p.sums}, p.threads, place);
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

}  // namespace megakern
