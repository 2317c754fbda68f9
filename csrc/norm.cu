// LayerNorm and RMSNorm of x + residual, forward and backward; megakern/ops/norm.py has the formulas.
//
// Writes every output whole (=). Arithmetic and statistics are fp32; centring comes before squaring, so that a large mean
// costs no digits. Deterministic: a block adds up the weight gradients of its rows in a fixed order and leaves one fp32
// row of sums, which a last kernel adds up in order; no atomics.
//
// A row belongs to blockDim.x threads, thread t to its vectors of 16 bytes t, t + blockDim.x, ...; a block holds
// blockDim.y rows at a time. Blocks are persistent. While a block works on its rows, the next ones are on their way into
// shared memory (cp.async), each thread's vectors into slots that it alone reads, so that no barrier guards them. Each
// tensor is read once and written once; weight and bias stay in L1. A row too long for one SM is split over the blocks of
// a cluster (sm_90 and up), which exchange their sums through shared memory. megakern/kernels/cuda/tables.py chooses the
// threads, rows and blocks; the launchers check them.
//
// Rows that do not fit, and rows whose addresses, strides or length are no multiples of 16 bytes: norm_chunks.cu.
#include "norm.cuh"

#include <algorithm>

#include "device/checks.h"
#include "device/ptx.cuh"

namespace megakern {
namespace {

constexpr int kStages = 2;             // rows in shared memory: one being worked on, one arriving
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
  static std::size_t bytes(int inputs, int steps, int threads) { return std::size_t(kStages) * inputs * steps * threads * 16; }

  MK_DEVICE Slots(SharedMemory& shared, int inputs, int steps)
      : step_(int(blockDim.x * blockDim.y) * kVector<T>), input_(steps * step_), stage_(inputs * input_),
        all_(shared.take<T>(kStages * stage_)), own_(all_ + (threadIdx.y * blockDim.x + threadIdx.x) * kVector<T>) {}

  MK_DEVICE T* operator()(int stage, int input, int step) const {
    return own_ + stage * stage_ + input * input_ + step * step_;
  }
  MK_DEVICE float* all() const { return reinterpret_cast<float*>(all_); }

 private:
  int step_, input_, stage_;
  T *all_, *own_;
};

template <class T, class W>
MK_KERNEL void __launch_bounds__(1024) norm_forward_kernel(NormForward p) {
  constexpr int V = kVector<T>;
  SharedMemory shared;
  const Part part(p.C, V, p.cluster);
  RowSums<1> row_sum(shared, part.rank, part.ranks);
  const Slots<T> slot(shared, p.residual ? 2 : 1, part.steps);
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  const W *weights = static_cast<const W*>(p.weight), *biases = static_cast<const W*>(p.bias);
  T *y = static_cast<T*>(p.y), *h = static_cast<T*>(p.h);
  const bool centred = p.mean != nullptr;
  const int first = part.begin + threadIdx.x;

  const auto start = [&](int64_t row, int stage) {
    for (int k = 0, j = first; row < p.M && j < part.end; ++k, j += blockDim.x) {
      cp_async<16>(slot(stage, 0, k), x + row * p.x_stride + j * V);
      if (residual) cp_async<16>(slot(stage, 1, k), residual + row * p.residual_stride + j * V);
    }
    cp_async_commit();
  };

  int stage = 0;
  start(part.row + threadIdx.y, stage);
  for (int64_t top = part.row; top < p.M; top += part.stride, stage ^= 1) {
    const int64_t row = top + threadIdx.y;
    start(row + part.stride, stage ^ 1);
    cp_async_wait<1>();
    const int end = row < p.M ? part.end : 0;

    float sum = 0.0f;  // of h, or of its squares
#pragma unroll 4
    for (int k = 0, j = first; j < end; ++k, j += blockDim.x) {
      Vector<float, V> value = to_float(load<V>(slot(stage, 0, k)));
      if (residual) {
        const Vector<float, V> added = to_float(load<V>(slot(stage, 1, k)));
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] += added[i];
        const Vector<T, V> rounded = from_float<T>(value);  // statistics are those of what backward reads
        store_shared(slot(stage, 0, k), rounded);
        store(h + row * p.C + j * V, rounded);
        value = to_float(rounded);
      }
      if (!centred) {
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] *= value[i];
      }
      sum += sum_of(value);
    }
    sum = row_sum({sum}).value[0];
    float mean = 0.0f;
    if (centred) {
      mean = sum / p.C;
      sum = 0.0f;
#pragma unroll 4
      for (int k = 0, j = first; j < end; ++k, j += blockDim.x) {
        Vector<float, V> value = to_float(load<V>(slot(stage, 0, k)));
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] = (value[i] - mean) * (value[i] - mean);
        sum += sum_of(value);
      }
      sum = row_sum({sum}).value[0];
    }
    const float rstd = rsqrt(sum / p.C + p.eps);
    if (threadIdx.x == 0 && part.rank == 0 && row < p.M) {
      p.rstd[row] = rstd;
      if (centred) p.mean[row] = mean;
    }
#pragma unroll 4
    for (int k = 0, j = first; j < end; ++k, j += blockDim.x) {
      const Vector<float, V> weight = to_float(load<V>(weights + j * V));
      const Vector<float, V> bias = biases ? to_float(load<V>(biases + j * V)) : filled<float, V>(0.0f);
      Vector<float, V> value = to_float(load<V>(slot(stage, 0, k)));
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = (value[i] - mean) * rstd * weight[i] + bias[i];
      store(y + row * p.C + j * V, from_float<T>(value));
    }
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
  const Slots<T> slot(shared, p.dh ? 3 : 2, part.steps);
  const T *dy = static_cast<const T*>(p.dy), *h = static_cast<const T*>(p.h), *dh = static_cast<const T*>(p.dh);
  const W* weights = static_cast<const W*>(p.weight);
  T* dx = static_cast<T*>(p.dx);
  const int first = part.begin + threadIdx.x;

  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto start = [&](int64_t row, int stage) {
    if (row < p.M) {
      next_rstd = p.rstd[row];
      if (p.mean) next_mean = p.mean[row];
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

  Vector<float, V> dweight[kSteps], dbias[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) dweight[k] = dbias[k] = filled<float, V>(0.0f);

  int stage = 0;
  start(part.row + threadIdx.y, stage);
  for (int64_t top = part.row; top < p.M; top += part.stride, stage ^= 1) {
    const int64_t row = top + threadIdx.y;
    const float mean = next_mean, rstd = next_rstd;
    start(row + part.stride, stage ^ 1);
    cp_async_wait<1>();
    const int end = row < p.M ? part.end : 0;

    Sums<2> sums = {};  // of dy weight normed, of dy weight
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int j = first + k * blockDim.x;
      if (j >= end) break;
      const Vector<float, V> weight = to_float(load<V>(weights + j * V));
      const Vector<float, V> gradient = to_float(load<V>(slot(stage, 0, k)));
      const Vector<float, V> value = to_float(load<V>(slot(stage, 1, k)));
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float normed = (value[i] - mean) * rstd, scaled = gradient[i] * weight[i];
        dweight[k][i] += gradient[i] * normed;
        dbias[k][i] += gradient[i];
        sums.value[0] += scaled * normed;
        sums.value[1] += scaled;
      }
    }
    sums = row_sums(sums);
    const float slope = sums.value[0] / p.C * rstd;
    const float shift = p.mean ? sums.value[1] / p.C : 0.0f;
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
        out[i] += (gradient[i] * weight[i] - (value[i] - mean) * slope - shift) * rstd;
      }
      store(dx + row * p.C + j * V, from_float<T>(out));
    }
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

// The shared memory of a block whose rows are `inputs` tensors of `steps` vectors a thread; checks the configuration.
template <int N>
std::size_t block_bytes(const Checks& check, int inputs, int steps, int threads, int rows, int ranks) {
  const bool warps = threads % kWarp == 0 || (kWarp % threads == 0 && threads * rows % kWarp == 0);
  if (!warps || (rows > 1 && ranks > 1)) {
    check.require(false, "a row takes 1, 2, 4, 8, 16 or a multiple of 32 threads, a block whole warps, a block of a cluster "
                         "one row; got " + std::to_string(threads) + " threads a row, " + std::to_string(rows) +
                         " rows a block, clusters of " + std::to_string(ranks));
  }
  const std::size_t bytes = RowSums<N>::bytes(threads, rows, ranks) + Slots<float>::bytes(inputs, steps, threads * rows);
  check.size("shared memory of a block", int64_t(bytes), 1, kMostShared);
  return bytes;
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
  check.size("threads x rows", int64_t(p.threads) * p.rows, kWarp, 1024);
  check.size("cluster", p.cluster, 1, 8);
  const int steps = ceil_div(ceil_div(int(p.C * size_of(p.dtype) / 16), p.cluster), p.threads);
  const std::size_t shared = block_bytes<1>(check, p.residual ? 2 : 1, steps, p.threads, p.rows, p.cluster);
  const dim3 grid(check.blocks(int64_t(p.blocks) * p.cluster)), block(p.threads, p.rows);
  with_dtypes(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    MK_LAUNCH_CLUSTER((norm_forward_kernel<decltype(t), decltype(w)>), grid, block, shared, p.cluster, place, p);
  });
}

void norm_backward(const NormBackward& p, Place place) {
  Checks check("norm_backward");
  check.floating(p.dtype);
  if (p.weight_dtype != Dtype::f32) check.same("weight_dtype", p.weight_dtype, p.dtype);
  check.size("M", p.M), check.size("C", p.C, 1), check.size("parts", p.parts, p.M > 0);
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
    check.size("threads x rows", int64_t(p.threads) * p.rows, kWarp, kBackwardThreads);
    check.size("cluster", p.cluster, 1, 8);
    const int steps = ceil_div(ceil_div(int(p.C * size_of(p.dtype) / 16), p.cluster), p.threads);
    check.size("vectors a thread", steps, 1, kSteps);
    const std::size_t shared = block_bytes<2>(check, p.dh ? 3 : 2, steps, p.threads, p.rows, p.cluster);
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
