// LayerNorm and RMSNorm of x + residual, forward and backward; megakern/ops/norm.py has the formulas.
//
// Writes every output whole (=). Arithmetic and statistics are fp32; centring comes before squaring, so that a large mean
// costs no digits. Deterministic: a block adds up the weight gradients of its rows in a fixed order and leaves one fp32
// row of sums, which a last kernel adds up in order; no atomics.
//
// A row belongs to blockDim.x threads, thread t to its vectors of 16 bytes t, t + blockDim.x, ...; a block holds
// blockDim.y rows at a time. Each tensor is read once and written once; weight and bias stay in L1. A row too long for one
// SM is split over the blocks of a cluster (sm_90 and up), which exchange their sums through shared memory.
//
// Forward, a row is held in registers: all its loads are on their way before the first is used, and while one block waits
// for them or for its sums, the others of the SM move data. Backward, where registers hold the sums of columns, blocks are
// persistent: the next rows are on their way into shared memory (cp.async), each thread's vectors into slots that it alone
// reads, so that no barrier guards them. megakern/kernels/cuda/configs.py chooses the threads, rows, blocks and stages;
// the launchers check them.
//
// Rows that do not fit, and rows whose addresses, strides or length are no multiples of 16 bytes: norm_chunks.cu.
#include "norm.cuh"

#include <algorithm>

#include "device/checks.h"
#include "device/ptx.cuh"

namespace megakern {
namespace {

constexpr int kMostStages = 4;         // rows of a thread in shared memory: one being worked on, the others arriving
constexpr int kForwardSteps = 8;       // most vectors of a row that a thread holds
constexpr int kSteps = 4;              // most vectors a thread in the backward pass: 64 fp32 sums for 16-bit columns,
constexpr int kBackwardThreads = 512;  // in blocks of at most this size, which have 128 registers a thread
constexpr int kMostShared = 227 * 1024;

// --- kernels ---

// The vectors of a row that this block owns (all, but in a cluster), and the rows that it walks, blockDim.y at a time.
struct Part {
  int rank, ranks;  // of the cluster
  int begin, end;   // vectors
  int steps;        // most of a thread, alike in all blocks
  int64_t row, stride;

  MK_DEVICE Part(int C, int V, int cluster)
      : rank(cluster > 1 ? cluster_rank() : 0), ranks(cluster), row(int64_t(blockIdx.x / cluster) * blockDim.y),
        stride(int64_t(gridDim.x / cluster) * blockDim.y) {
    const int most = ceil_div(C / V, ranks);
    begin = rank * most;
    end = begin + most < C / V ? begin + most : C / V;
    steps = ceil_div(most, int(blockDim.x));
  }
};

// This thread's slots in shared memory, one vector each. Neighbouring threads have neighbouring slots.
template <class T>
class Slots {
 public:
  static std::size_t bytes(int stages, int inputs, int steps, int threads) {
    return std::size_t(stages) * inputs * steps * threads * 16;
  }

  MK_DEVICE Slots(SharedMemory& shared, int stages, int inputs, int steps)
      : step_(int(blockDim.x * blockDim.y) * kVector<T>), input_(steps * step_), stage_(inputs * input_),
        all_(shared.take<T>(stages * stage_)), own_(all_ + (threadIdx.y * blockDim.x + threadIdx.x) * kVector<T>) {}

  MK_DEVICE T* operator()(int stage, int input, int step) const {
    return own_ + stage * stage_ + input * input_ + step * step_;
  }
  MK_DEVICE float* all() const { return reinterpret_cast<float*>(all_); }

 private:
  int step_, input_, stage_;
  T *all_, *own_;
};

// Threads of a block of the forward pass, at most, and how many such blocks an SM has registers for: 48 registers a thread
// for 2 vectors of a row, 64 for more.
template <int STEPS>
constexpr int kForwardThreads = STEPS == 2 ? 256 : 1024;
template <int STEPS>
constexpr int kForwardBlocks = STEPS == 2 ? 5 : 1;

// STEPS: the vectors of a row that a thread holds, at most. With 8 there is no room for a residual, nor for clusters.
template <class T, class W, int STEPS>
MK_KERNEL void __launch_bounds__(kForwardThreads<STEPS>, kForwardBlocks<STEPS>) norm_forward_kernel(NormForward p) {
  constexpr int V = kVector<T>;
  SharedMemory shared;
  const Part part(p.C, V, STEPS == 4 ? p.cluster : 1);
  RowSums<3> sums(shared, part.rank, part.ranks);
  const T *x = static_cast<const T*>(p.x), *residual = STEPS < kForwardSteps ? static_cast<const T*>(p.residual) : nullptr;
  const W *weights = static_cast<const W*>(p.weight), *biases = static_cast<const W*>(p.bias);
  T *y = static_cast<T*>(p.y), *h = static_cast<T*>(p.h);
  const bool centred = p.mean != nullptr;
  const int first = part.begin + threadIdx.x, step = blockDim.x;
  const int64_t row = part.row + threadIdx.y;
  const int end = row < p.M ? part.end : 0;
  Packed<T> value[STEPS];
  const auto read = [&](Packed<T>* to, const T* from, int k) {
    const int j = first + k * step;
    *to = {};
    if (j < end) *to = load_packed_once(from + int64_t(j) * V);
  };
#pragma unroll
  for (int k = 0; k < STEPS; ++k) read(&value[k], x + row * p.x_stride, k);
  if (residual) {
    Packed<T> added[STEPS];
#pragma unroll
    for (int k = 0; k < STEPS; ++k) read(&added[k], residual + row * p.residual_stride, k);
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      Vector<float, V> sum = to_float(value[k]);
      const Vector<float, V> more = to_float(added[k]);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += more[i];
      value[k] = packed(from_float<T>(sum));  // statistics are those of what backward reads
    }
  }

  // A warp takes the mean of its own columns, and the squares about it; one exchange joins those of all warps
  // (Chan, Golub and LeVeque 1979).
  float mean = 0.0f, squares = 0.0f, count = 0.0f;
  if (centred) {
    Sums<2> own = {};  // sum and count
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      own.value[0] += sum_of(to_float(value[k]));
      own.value[1] += first + k * step < end ? float(V) : 0.0f;
    }
    own = sums.of_warp(own);
    count = own.value[1];
    mean = count > 0.0f ? own.value[0] / count : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    Vector<float, V> square = to_float(value[k]);
#pragma unroll
    for (int i = 0; i < V; ++i) square[i] = (square[i] - mean) * (square[i] - mean);
    squares += first + k * step < end ? sum_of(square) : 0.0f;
  }
  squares = sums.of_warp(squares);
  if (sums.warps() > 1) {
    const int lane = threadIdx.x % kWarp;
    const Sums<3>* all = sums.gather({count, mean, squares});
    mean = squares = 0.0f;
    if (centred) {
#pragma unroll 1
      for (int i = lane; i < sums.warps(); i += kWarp) mean += all[i].value[0] * all[i].value[1];
      mean = warp_reduce(mean, Add{}) / p.C;
    }
#pragma unroll 1
    for (int i = lane; i < sums.warps(); i += kWarp) {
      const float apart = all[i].value[1] - mean;
      squares += all[i].value[2] + all[i].value[0] * apart * apart;
    }
    squares = warp_reduce(squares, Add{});
  }
  const float rstd = rsqrt(squares / p.C + p.eps);
  if (threadIdx.x == 0 && part.rank == 0 && row < p.M) {
    p.rstd[row] = rstd;
    if (centred) p.mean[row] = mean;
  }
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    const int j = first + k * step;
    if (j >= end) break;
    const Vector<float, V> weight = to_float(load<V>(weights + j * V));
    Vector<float, V> out = to_float(value[k]);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = (out[i] - mean) * rstd * weight[i];
    if (biases) {
      const Vector<float, V> bias = to_float(load<V>(biases + j * V));
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] += bias[i];
    }
    const int64_t at = row * p.C + int64_t(j) * V;
    store(y + at, from_float<T>(out));
    if (residual) store(h + at, value[k]);
  }
}

// Adds this block's sums, a vector a step of a thread, over its blockDim.y rows, in order -> `out`, a row of parts.
// `area`: shared memory for all of them, to which no copy is on its way.
template <int V>
MK_DEVICE void leave_sums(const Vector<float, V> (&sums)[kSteps], float* area, const Part& part, float* out) {
  const int vectors = part.end - part.begin, rows = blockDim.y;
  sync_block();  // the area may still be read
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int j = threadIdx.x + k * blockDim.x;
    if (j >= vectors) break;
    if (rows == 1) store(out + (part.begin + j) * V, sums[k]);
    else store_shared(area + (threadIdx.y * vectors + j) * V, sums[k]);
  }
  if (rows == 1) return;
  sync_block();
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < vectors * V; c += blockDim.x * blockDim.y) {
    float total = 0.0f;
    for (int y = 0; y < rows; ++y) total += area[y * vectors * V + c];
    out[c] = total;
  }
}

template <class T, class W>
MK_KERNEL void __launch_bounds__(kBackwardThreads, 1) norm_backward_kernel(NormBackward p) {
  constexpr int V = kVector<T>;
  SharedMemory shared;
  const Part part(p.C, V, p.cluster);
  RowSums<2> row_sums(shared, part.rank, part.ranks);
  const Slots<T> slot(shared, p.stages, p.dh ? 3 : 2, part.steps);
  const T *dy = static_cast<const T*>(p.dy), *h = static_cast<const T*>(p.h), *dh = static_cast<const T*>(p.dh);
  const W* weights = static_cast<const W*>(p.weight);
  T* dx = static_cast<T*>(p.dx);
  const int first = part.begin + threadIdx.x;
  const float inverse_C = 1.0f / p.C;

  const auto start = [&](int64_t row, int stage) {
    if (row < p.M) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const int j = first + k * blockDim.x;
        if (j >= part.end) break;
        cp_async<16>(slot(stage, 0, k), dy + row * p.dy_stride + j * V);
        cp_async<16>(slot(stage, 1, k), h + row * p.h_stride + j * V);
        if (dh) cp_async<16>(slot(stage, 2, k), dh + row * p.dh_stride + j * V);
      }
    }
    cp_async_commit();
  };
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto start_statistics = [&](int64_t row) {
    if (row >= p.M) return;
    next_rstd = p.rstd[row];
    if (p.mean) next_mean = p.mean[row];
  };

  Vector<float, V> dweight[kSteps], dbias[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) dweight[k] = dbias[k] = filled<float, V>(0.0f);

  start_statistics(part.row + threadIdx.y);
  for (int ahead = 0; ahead < p.stages - 1; ++ahead) start(part.row + ahead * part.stride + threadIdx.y, ahead);
  int stage = 0, free = p.stages - 1;
  for (int64_t top = part.row; top < p.M; top += part.stride) {
    const int64_t row = top + threadIdx.y;
    const float mean = next_mean, rstd = next_rstd;
    start_statistics(row + part.stride);
    start(row + (p.stages - 1) * part.stride, free);
    if (p.stages == 2) cp_async_wait<1>();
    else if (p.stages == 3) cp_async_wait<2>();
    else cp_async_wait<3>();
    const int end = row < p.M ? part.end : 0;

    Sums<2> sums = {};  // of dy weight (h - mean), of dy weight
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int j = first + k * blockDim.x;
      if (j >= end) break;
      const Vector<float, V> weight = to_float(load<V>(weights + j * V));
      const Vector<float, V> gradient = to_float(load<V>(slot(stage, 0, k)));
      const Vector<float, V> value = to_float(load<V>(slot(stage, 1, k)));
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float apart = value[i] - mean, scaled = gradient[i] * weight[i];
        dweight[k][i] += gradient[i] * (apart * rstd);
        dbias[k][i] += gradient[i];
        sums.value[0] += scaled * apart;
        sums.value[1] += scaled;
      }
    }
    sums = row_sums(sums);
    const float slope = sums.value[0] * inverse_C * rstd * rstd;
    const float shift = p.mean ? sums.value[1] * inverse_C : 0.0f;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int j = first + k * blockDim.x;
      if (j >= end) break;
      const Vector<float, V> weight = to_float(load<V>(weights + j * V));
      const Vector<float, V> gradient = to_float(load<V>(slot(stage, 0, k)));
      const Vector<float, V> value = to_float(load<V>(slot(stage, 1, k)));
      Vector<float, V> out = dh ? to_float(load<V>(slot(stage, 2, k))) : filled<float, V>(0.0f);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        out[i] += (gradient[i] * weight[i] - shift - (value[i] - mean) * slope) * rstd;
      }
      store(dx + row * p.C + j * V, from_float<T>(out));
    }
    free = stage;
    stage = stage + 1 == p.stages ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  const int64_t at = int64_t(blockIdx.x / part.ranks) * p.C;
  leave_sums(dweight, slot.all(), part, p.dweight_parts + at);
  if (p.dbias_parts) leave_sums(dbias, slot.all(), part, p.dbias_parts + at);
}

struct SumParts {
  const float *dweight_parts, *dbias_parts;
  void *dweight, *dbias;
  int P, C;
};

// Block (i, 0): dweight[c] = sum over the P rows of dweight_parts, 32 columns from 32 i on; block (i, 1): dbias.
template <class W>
MK_KERNEL void __launch_bounds__(1024) norm_sum_parts_kernel(SumParts p) {
  SharedMemory shared;
  float* sums = shared.take<float>(blockDim.x * blockDim.y);
  const float* parts = blockIdx.y ? p.dbias_parts : p.dweight_parts;
  const int col = blockIdx.x * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (col < p.C) {
#pragma unroll 4
    for (int row = threadIdx.y; row < p.P; row += blockDim.y) sum += parts[int64_t(row) * p.C + col];
  }
  sums[threadIdx.y * kWarp + threadIdx.x] = sum;
  sync_block();
  if (threadIdx.y > 0 || col >= p.C) return;
  for (int y = 1; y < int(blockDim.y); ++y) sum += sums[y * kWarp + threadIdx.x];
  static_cast<W*>(blockIdx.y ? p.dbias : p.dweight)[col] = from_float<W>(sum);
}

// --- launchers ---

// The vectors of a row that a thread holds, of at most `most`; checks how rows are spread over threads and blocks.
int steps_of(const Checks& check, int vectors, int threads, int rows, int ranks, int most) {
  check.size("cluster", ranks, 1, 8);
  check.size("threads x rows", int64_t(threads) * rows, kWarp, 1024);
  const bool warps = threads % kWarp == 0 || (kWarp % threads == 0 && threads * rows % kWarp == 0);
  if (!warps || (rows > 1 && ranks > 1)) {
    check.require(false, "a row takes 1, 2, 4, 8, 16 or a multiple of 32 threads, a block whole warps, a block of a cluster "
                         "one row; got " + std::to_string(threads) + " threads a row, " + std::to_string(rows) +
                         " rows a block, clusters of " + std::to_string(ranks));
  }
  const int steps = ceil_div(ceil_div(vectors, ranks), threads);
  check.size("vectors a thread", steps, 1, most);
  return steps;
}

bool fits(const void* pointer, int64_t stride, Dtype dtype) { return vectors_fit(pointer, stride * size_of(dtype)); }
bool fits(const void* pointer) { return vectors_fit(pointer, 0); }

// f(T{}, W{}): the types of x, and of weight and bias, which are that of x or fp32.
template <class F>
void with_dtypes(Dtype dtype, Dtype weight_dtype, F f) {
  with_dtype(dtype, [&](auto t) {
    if (weight_dtype == dtype) f(t, t);
    else f(t, float{});
  });
}

}  // namespace

void norm_forward(const NormForward& p, Place place) {
  Checks check("norm_forward");
  check.floating(p.dtype);
  if (p.weight_dtype != Dtype::f32) check.same("weight_dtype", p.weight_dtype, p.dtype);
  check.size("M", p.M), check.size("C", p.C, 1);
  check.reads("x", p.x, p.dtype, p.M, p.C, p.x_stride);
  if (p.residual) check.reads("residual", p.residual, p.dtype, p.M, p.C, p.residual_stride);
  check.reads("weight", p.weight, p.weight_dtype, p.C);
  if (p.bias) check.reads("bias", p.bias, p.weight_dtype, p.C);
  check.writes("y", p.y, p.dtype, p.M, p.C, p.C);
  if (p.residual) check.writes("h", p.h, p.dtype, p.M, p.C, p.C);
  if (p.mean) check.writes("mean", p.mean, Dtype::f32, p.M);
  check.writes("rstd", p.rstd, Dtype::f32, p.M);
  if (p.M == 0) return;

  const bool vectors = fits(p.x, p.x_stride, p.dtype) && fits(p.residual, p.residual ? p.residual_stride : 0, p.dtype) &&
                       fits(p.y, p.C, p.dtype) && fits(p.h) && fits(p.weight) && fits(p.bias);
  if (!vectors || p.threads == 0) return norm_forward_chunks(p, vectors, place);
  const int steps = steps_of(check, int(p.C * size_of(p.dtype) / 16), p.threads, p.rows, p.cluster,
                             p.residual || p.cluster > 1 ? kForwardSteps / 2 : kForwardSteps);
  const std::size_t shared = RowSums<3>::bytes(p.threads, p.rows, p.cluster);
  const dim3 grid(check.blocks(ceil_div<int64_t>(p.M, p.rows) * p.cluster)), block(p.threads, p.rows);
  with_dtypes(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    const auto launch = [&](auto most) {
      check.size("threads x rows", int64_t(p.threads) * p.rows, kWarp, kForwardThreads<most>);
      MK_LAUNCH_CLUSTER((norm_forward_kernel<decltype(t), decltype(w), most>), grid, block, shared, p.cluster, place, p);
    };
    if (steps <= 2) launch(std::integral_constant<int, 2>());
    else if (steps <= 4) launch(std::integral_constant<int, 4>());
    else launch(std::integral_constant<int, kForwardSteps>());
  });
}

void norm_backward(const NormBackward& p, Place place) {
  Checks check("norm_backward");
  check.floating(p.dtype);
  if (p.weight_dtype != Dtype::f32) check.same("weight_dtype", p.weight_dtype, p.dtype);
  check.size("M", p.M), check.size("C", p.C, 1), check.size("parts", p.parts, p.M > 0, 65535);  // gridDim.y, in chunks
  check.reads("dy", p.dy, p.dtype, p.M, p.C, p.dy_stride);
  if (p.dh) check.reads("dh", p.dh, p.dtype, p.M, p.C, p.dh_stride);
  check.reads("h", p.h, p.dtype, p.M, p.C, p.h_stride);
  check.reads("weight", p.weight, p.weight_dtype, p.C);
  if (p.mean) check.reads("mean", p.mean, Dtype::f32, p.M);
  check.reads("rstd", p.rstd, Dtype::f32, p.M);
  check.writes("dx", p.dx, p.dtype, p.M, p.C, p.C);
  check.writes("dweight", p.dweight, p.weight_dtype, p.C);
  check.writes("dweight_parts", p.dweight_parts, Dtype::f32, p.parts, p.C, p.C);
  if (p.dbias) check.writes("dbias", p.dbias, p.weight_dtype, p.C);
  if (p.dbias) check.writes("dbias_parts", p.dbias_parts, Dtype::f32, p.parts, p.C, p.C);

  const bool vectors = fits(p.dy, p.dy_stride, p.dtype) && fits(p.h, p.h_stride, p.dtype) &&
                       fits(p.dh, p.dh ? p.dh_stride : 0, p.dtype) && fits(p.dx, p.C, p.dtype) && fits(p.weight) &&
                       fits(p.dweight_parts) && fits(p.dbias_parts);
  if (p.M > 0 && (!vectors || p.threads == 0)) {
    norm_backward_chunks(p, vectors, place);
  } else if (p.M > 0) {
    const int steps = steps_of(check, int(p.C * size_of(p.dtype) / 16), p.threads, p.rows, p.cluster, kSteps);
    check.size("threads x rows", int64_t(p.threads) * p.rows, kWarp, kBackwardThreads);
    check.size("stages", p.stages, 2, kMostStages);
    const std::size_t shared = RowSums<2>::bytes(p.threads, p.rows, p.cluster) +
                               Slots<float>::bytes(p.stages, p.dh ? 3 : 2, steps, p.threads * p.rows);
    check.size("shared memory of a block", int64_t(shared), 1, kMostShared);
    const dim3 grid(check.blocks(int64_t(p.parts) * p.cluster)), block(p.threads, p.rows);
    with_dtypes(p.dtype, p.weight_dtype, [&](auto t, auto w) {
      MK_LAUNCH_CLUSTER((norm_backward_kernel<decltype(t), decltype(w)>), grid, block, shared, p.cluster, place, p);
    });
  }
  const SumParts sums{p.dweight_parts, p.dbias ? p.dbias_parts : nullptr, p.dweight, p.dbias, p.M > 0 ? p.parts : 0, p.C};
  const int lanes = std::max(1, std::min(32, ceil_div(sums.P, 4)));  // four loads of a thread in flight
  const dim3 grid(ceil_div(p.C, kWarp), p.dbias ? 2 : 1), block(kWarp, lanes);
  with_dtype(p.weight_dtype, [&](auto t) {
    MK_LAUNCH(norm_sum_parts_kernel<decltype(t)>, grid, block, shared_bytes<float>(kWarp * lanes), place, sums);
  });
}

}  // namespace megakern
