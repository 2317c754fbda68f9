// The loss of rows of logits and d(row loss)/d(logits) in one read and one write; `out` may be the logits; writes = .
//
// loss_and_gradient    a block walks whole rows, and keeps a row on chip between the loss and the gradient: `held` chunks of
//                      16 bytes a thread in registers, `kept` in shared memory; what does not fit is read again. While it
//                      writes a row's gradient it fetches the next row into the space that falls free. Between a row's
//                      last chunk and its first gradient are the sums of the block: for those microseconds the memory has
//                      the first `ahead` chunks a thread of the row after, in slots beyond `kept`. A thread sees no chunk
//                      but its own: the only barriers are those of the sums.
// scale                x = factor x, where the factor, read on the device, is not 1: for a gradient made before its scale.
//
// Limits: as cross_entropy.cu; a vocabulary on one rank.
#include "cross_entropy.cuh"

namespace megakern {
namespace {

constexpr int kHeld = 10;   // chunks in registers for rows that shared memory cannot hold: 40 of 128 registers
constexpr int kGroups = 8;  // parts of a row that arrive one after another

// --- kernels ---

// Waits until all groups of copies but the last `pending` are here.
MK_DEVICE void wait_but(int pending) {
  switch (pending) {
    case 0: return cp_async_wait<0>();
    case 1: return cp_async_wait<1>();
    case 2: return cp_async_wait<2>();
    case 3: return cp_async_wait<3>();
    case 4: return cp_async_wait<4>();
    case 5: return cp_async_wait<5>();
    case 6: return cp_async_wait<6>();
    case 7: return cp_async_wait<7>();
    case 8: return cp_async_wait<8>();
    default: return cp_async_wait<9>();
  }
}

template <class T, int HELD>
MK_KERNEL __launch_bounds__(kThreads, HELD > 0 ? 1 : 2) void loss_and_gradient_kernel(CrossEntropyLossAndGradient p) {
  SharedMemory shared;
  Scratch scratch(shared);
  const int step = int(blockDim.x), me = int(threadIdx.x), per_group = ceil_div(p.kept, kGroups);
  const int groups_ahead = per_group ? p.ahead / per_group : 0;
  const int first_slot = HELD * step + me, rest = (HELD + p.kept) * step;  // chunks from `rest` on do not fit
  const int ring = (p.kept + p.ahead) * step;
  Words* const slots = shared.take<Words>(ring) + me;
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
  // f(k, place) for this thread's places of a row, a ring from `slot` on, and their chunks; before(group) and after() around
  // each group of them -> the first slot of the next row.
  const auto each_slot = [&](int slot, auto before, auto f, auto after) {
    int k = first_slot;
    for (int group = 0; group < kGroups; ++group) {
      before(group);
      const int left = p.kept - group * per_group;
      for (int j = left < per_group ? left : per_group; j > 0; --j, k += step) {
        f(k, slots + slot);
        slot = slot + step == ring ? 0 : slot + step;
      }
      after();
    }
    return slot;
  };
  // The slots of a row, once `empty` has used them, take what `coming`, the next row, still lacks, and then the start of
  // row number `after`.
  const auto refill = [&](int slot, auto empty, Coming<T> coming, int64_t after, int64_t after_target) {
    int at = first_slot + p.ahead * step;
    return each_slot(slot, [](int) {},
                     [&](int k, Words* place) {
                       empty(k, place);
                       if (at >= rest) {
                         coming = Coming<T>(p.rows, after, after_target);
                         at -= p.kept * step;
                       }
                       fetch_slot(coming, at, place);
                       at += step;
                     },
                     [] { cp_async_commit(); });
  };

  const int64_t stride = gridDim.x;
  Coming<T> row(p.rows, blockIdx.x, target_of(p.rows, blockIdx.x));
  int64_t next_target = target_of(p.rows, blockIdx.x + stride);
#pragma unroll
  for (int j = 0; j < HELD; ++j) fetch_held(row, j);
  fetch_edge(row);
  const auto nothing = [](int, Words*) {};  // two rows before the first, so that groups are counted as later
  int slot = refill(0, nothing, Coming<T>(p.rows, 0, p.rows.ignore_index), blockIdx.x, row.target);
  slot = refill(slot, nothing, row, blockIdx.x + stride, next_target);

  for (int64_t index = blockIdx.x; index < p.rows.M; index += stride) {
    const int64_t after_target = target_of(p.rows, index + 2 * stride);
    const int own = own_column(row.target, p.rows);
    const float scale = p.scale ? p.scale[index * p.scale_stride] : 1.0f;
    float at_target = logit_of_target(p.rows, row);  // before anything is written over it

    Seen seen;
    const auto absorb = [&](int, const Words& chunk) { seen.absorb(floats_of<T>(chunk), smooth); };
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
      if (j * step + me < row.span.chunks) absorb(j, held[j]);
    }
    // A group arrives with the row before's groups up to as many before it as `ahead` fills.
    each_slot(slot, [&](int group) { wait_but(kGroups - 1 - group + groups_ahead); },
              [&](int k, Words* place) {
                if (k < row.span.chunks) absorb(k, load<4>(place->values));
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
    const Coming<T> next(p.rows, index + stride, next_target);
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
    const auto emit_slot = [&](int k, Words* place) {
      if (k < row.span.chunks) emit(k, load<4>(place->values));
    };
    slot = refill(slot, emit_slot, next, index + 2 * stride, after_target);
    out.pad(row.target == p.rows.ignore_index ? 0 : int(p.rows.real), int(p.rows.C));
    row = Coming<T>(p.rows, index + stride, next_target);
    next_target = after_target;
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

}  // namespace

// --- launchers ---

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
  check.size("ahead", p.ahead, 0, p.kept);
  check.size("blocks", p.blocks, 1, kMostBlocks);
  const std::size_t bytes = Scratch::bytes + std::size_t(p.kept + p.ahead) * p.threads * 16;
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
