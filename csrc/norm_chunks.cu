// LayerNorm and RMSNorm of rows that norm.cu does not hold on chip: any width, any address and stride.
//
// Writes every output whole (=), as norm.cu says. A row belongs to blockDim.x threads of one block, which walk it once for
// each sum and once for the output; after the first walk it comes from L1 or L2. The gradients of weight and bias are sums
// over columns of their own, by a kernel that reads dy and h again. Without VECTORS, elements are read one by one.
#include "norm.cuh"

namespace megakern {
namespace {

constexpr int kAhead = 2;         // loads of a thread in flight for each tensor
constexpr int kNarrow = 256;      // vectors of a row that one warp walks; wider ones get a block of kThreads
constexpr int kThreads = 256;
constexpr int kRowWarps = 8;      // warps that share columns in the weight gradient

// --- kernels ---

// Elements col, col + 1, ... of a weight or bias, whose dtype is that of T or fp32.
template <int V, class T>
MK_DEVICE Vector<float, V> parameters(const void* values, Dtype dtype, int64_t col) {
  if (sizeof(T) == 4 || dtype == Dtype::f32) return load<V>(static_cast<const float*>(values) + col);
  return to_float(load<V>(static_cast<const T*>(values) + col));
}

// f(first column, values...) for this thread's vectors of rows, kAhead loads of each before their use.
template <int V, class F, class... T>
MK_DEVICE void walk(int64_t C, F f, const T*... rows) {
  for (int64_t base = int64_t(threadIdx.x) * V; base < C; base += int64_t(kAhead) * blockDim.x * V) {
    const auto each = [&](auto body) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t col = base + int64_t(u) * blockDim.x * V;
        if (col < C) body(u, col);
      }
    };
    constexpr int inputs = sizeof...(T);
    using One = std::common_type_t<T...>;
    const One* const from[] = {rows...};
    Vector<One, V> read[kAhead][inputs];
    each([&](int u, int64_t col) {
#pragma unroll
      for (int i = 0; i < inputs; ++i) read[u][i] = load<V>(from[i] + col);
    });
    each([&](int u, int64_t col) {
      if constexpr (inputs == 1) f(col, to_float(read[u][0]));
      else f(col, to_float(read[u][0]), to_float(read[u][1]));
    });
  }
}

template <class T, bool VECTORS>
MK_KERNEL void __launch_bounds__(kThreads) norm_forward_chunks_kernel(NormForward p) {
  constexpr int V = VECTORS ? kVector<T> : 1;
  SharedMemory shared;
  RowSums<1> row_sum(shared);
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  T *y = static_cast<T*>(p.y), *h = static_cast<T*>(p.h);
  const bool centred = p.mean != nullptr;
  for (int64_t top = int64_t(blockIdx.x) * blockDim.y; top < p.M; top += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = top + threadIdx.y, C = row < p.M ? p.C : 0;
    const T* from = x + row * p.x_stride;
    float sum = 0.0f;  // of h, or of its squares
    const auto add = [&](const Vector<float, V>& value) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum += centred ? value[i] : value[i] * value[i];
    };
    if (residual) {
      const auto one = [&](int64_t col, Vector<float, V> value, const Vector<float, V>& added) {
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] += added[i];
        const Vector<T, V> rounded = from_float<T>(value);  // statistics are those of what backward reads
        store(h + row * p.C + col, rounded);
        add(to_float(rounded));
      };
      walk<V>(C, one, from, residual + row * p.residual_stride);
      from = h + row * p.C;  // a thread reads what it wrote
    } else {
      walk<V>(C, [&](int64_t, const Vector<float, V>& value) { add(value); }, from);
    }
    sum = row_sum({sum}).value[0];
    float mean = 0.0f;
    if (centred) {
      mean = sum / p.C;
      sum = 0.0f;
      const auto squares = [&](int64_t, const Vector<float, V>& value) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum += (value[i] - mean) * (value[i] - mean);
      };
      walk<V>(C, squares, from);
      sum = row_sum({sum}).value[0];
    }
    const float rstd = rsqrt(sum / p.C + p.eps);
    if (threadIdx.x == 0 && row < p.M) {
      p.rstd[row] = rstd;
      if (centred) p.mean[row] = mean;
    }
    const auto out = [&](int64_t col, Vector<float, V> value) {
      const Vector<float, V> weight = parameters<V, T>(p.weight, p.weight_dtype, col);
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = (value[i] - mean) * rstd * weight[i];
      if (p.bias) {
        const Vector<float, V> bias = parameters<V, T>(p.bias, p.weight_dtype, col);
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] += bias[i];
      }
      store(y + row * p.C + col, from_float<T>(value));
    };
    walk<V>(C, out, from);
  }
}

template <class T, bool VECTORS>
MK_KERNEL void __launch_bounds__(kThreads) norm_backward_chunks_kernel(NormBackward p) {
  constexpr int V = VECTORS ? kVector<T> : 1;
  SharedMemory shared;
  RowSums<2> row_sums(shared);
  for (int64_t top = int64_t(blockIdx.x) * blockDim.y; top < p.M; top += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = top + threadIdx.y, C = row < p.M ? p.C : 0;
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
    const T* h = static_cast<const T*>(p.h) + row * p.h_stride;
    const T* dh = static_cast<const T*>(p.dh) + (p.dh ? row * p.dh_stride : 0);
    T* dx = static_cast<T*>(p.dx) + row * p.C;
    const float rstd = C ? p.rstd[row] : 0.0f, mean = C && p.mean ? p.mean[row] : 0.0f;
    Sums<2> sums = {};  // of dy weight normed, of dy weight
    const auto add = [&](int64_t col, const Vector<float, V>& gradient, const Vector<float, V>& value) {
      const Vector<float, V> weight = parameters<V, T>(p.weight, p.weight_dtype, col);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float scaled = gradient[i] * weight[i];
        sums.value[0] += scaled * ((value[i] - mean) * rstd);
        sums.value[1] += scaled;
      }
    };
    walk<V>(C, add, dy, h);
    sums = row_sums(sums);
    const float slope = sums.value[0] / p.C * rstd, shift = p.mean ? sums.value[1] / p.C : 0.0f;
    const auto out = [&](int64_t col, const Vector<float, V>& gradient, const Vector<float, V>& value) {
      const Vector<float, V> weight = parameters<V, T>(p.weight, p.weight_dtype, col);
      Vector<float, V> result = filled<float, V>(0.0f);
      if (dh) result = to_float(load<V>(dh + col));
#pragma unroll
      for (int i = 0; i < V; ++i) {
        result[i] += (gradient[i] * weight[i] - (value[i] - mean) * slope - shift) * rstd;
      }
      store(dx + col, from_float<T>(result));
    };
    walk<V>(C, out, dy, h);
  }
}

// Block (i, j): 32 V columns, of rows j kRowWarps, ... -> row j of the parts. A warp takes every kRowWarps-th of these rows.
template <class T, bool VECTORS>
MK_KERNEL void __launch_bounds__(kWarp * kRowWarps) norm_weight_gradient_kernel(NormBackward p) {
  constexpr int V = VECTORS ? kVector<T> : 1;
  SharedMemory shared;
  float* area = shared.take<float>(kWarp * kRowWarps * V);
  const int64_t col = (int64_t(blockIdx.x) * kWarp + threadIdx.x) * V, step = int64_t(gridDim.y) * kRowWarps;
  Vector<float, V> dweight = filled<float, V>(0.0f), dbias = filled<float, V>(0.0f);
  if (col < p.C) {
#pragma unroll kAhead
    for (int64_t row = int64_t(blockIdx.y) * kRowWarps + threadIdx.y; row < p.M; row += step) {
      const Vector<float, V> gradient = to_float(load<V>(static_cast<const T*>(p.dy) + row * p.dy_stride + col));
      const Vector<float, V> value = to_float(load<V>(static_cast<const T*>(p.h) + row * p.h_stride + col));
      const float rstd = p.rstd[row], mean = p.mean ? p.mean[row] : 0.0f;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        dweight[i] += gradient[i] * ((value[i] - mean) * rstd);
        dbias[i] += gradient[i];
      }
    }
  }
  const auto leave = [&](const Vector<float, V>& sums, float* out) {
    sync_block();  // the area may still be read
    store_shared(area + (threadIdx.y * kWarp + threadIdx.x) * V, sums);
    sync_block();
    const int64_t first = int64_t(blockIdx.x) * kWarp * V;
    for (int c = threadIdx.y * kWarp + threadIdx.x; c < kWarp * V && first + c < p.C; c += kWarp * kRowWarps) {
      float total = 0.0f;
      for (int y = 0; y < kRowWarps; ++y) total += area[y * kWarp * V + c];
      out[int64_t(blockIdx.y) * p.C + first + c] = total;
    }
  };
  leave(dweight, p.dweight_parts);
  if (p.dbias) leave(dbias, p.dbias_parts);
}

// --- launchers ---

struct Shape {
  dim3 grid, block;
};

// Of a kernel that walks rows of C elements in vectors of V.
Shape shape(int64_t M, int64_t C, int V) {
  const bool narrow = ceil_div<int64_t>(C, V) <= kNarrow;
  const unsigned rows = narrow ? kRowWarps : 1;
  const int64_t blocks = ceil_div<int64_t>(M, rows), most = 1 << 20;  // they walk on
  return {dim3(unsigned(blocks < most ? blocks : most)), dim3(narrow ? kWarp : kThreads, rows)};
}

// launch(T{}, V): a constant, the elements of a vector.
template <class F>
void with_vectors(Dtype dtype, bool vectors, F launch) {
  with_dtype(dtype, [&](auto t) {
    if (vectors) launch(t, std::true_type());
    else launch(t, std::false_type());
  });
}

}  // namespace

void norm_forward_chunks(const NormForward& p, bool vectors, Place place) {
  with_vectors(p.dtype, vectors, [&](auto t, auto v) {
    using T = decltype(t);
    const Shape s = shape(p.M, p.C, v ? kVector<T> : 1);
    const std::size_t shared = RowSums<1>::bytes(s.block.x, s.block.y, 1);
    MK_LAUNCH((norm_forward_chunks_kernel<T, v>), s.grid, s.block, shared, place, p);
  });
}

void norm_backward_chunks(const NormBackward& p, bool vectors, Place place) {
  with_vectors(p.dtype, vectors, [&](auto t, auto v) {
    using T = decltype(t);
    constexpr int V = v ? kVector<T> : 1;
    const Shape s = shape(p.M, p.C, V);
    const std::size_t shared = RowSums<2>::bytes(s.block.x, s.block.y, 1);
    MK_LAUNCH((norm_backward_chunks_kernel<T, v>), s.grid, s.block, shared, place, p);
    const dim3 grid(ceil_div(p.C, kWarp * V), p.parts), block(kWarp, kRowWarps);
    MK_LAUNCH((norm_weight_gradient_kernel<T, v>), grid, block, shared_bytes<float>(kWarp * kRowWarps * V), place, p);
  });
}

}  // namespace megakern
