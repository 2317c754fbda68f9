// The sum of squares of many tensors; writes = . Two launches whatever their dtypes, no atomics: a block sums one piece of
// one tensor in fp32, 16 bytes a thread at a time, at any alignment; then one block adds up the pieces in a fixed order.
#include "device/reduce.cuh"
#include "device/span.cuh"
#include "device/tensors.cuh"

namespace megakern {
namespace {

constexpr int kThreads = 256, kTotalThreads = 1024;
constexpr int kBatch = 4;  // chunks a thread reads before it uses the first: 64 bytes in flight

enum Column { kAddress, kCount, kDtype, kColumns };

// --- kernels ---

template <class T>
MK_DEVICE float squares(const T* data, int count) {
  constexpr int N = kVector<T>;
  const Span<T> span(data, count);
  const int step = int(blockDim.x), me = int(threadIdx.x);
  float sums[kBatch] = {};
  const auto add = [&](float& sum, const Vector<T, N>& chunk) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum = fmaf(to_float(chunk[i]), to_float(chunk[i]), sum);
  };
  int k = me;
  for (; k + (kBatch - 1) * step < span.chunks; k += kBatch * step) {
    Vector<T, N> chunks[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) chunks[j] = load<N>(span.chunk(k + j * step));
#pragma unroll
    for (int j = 0; j < kBatch; ++j) add(sums[j], chunks[j]);
  }
  for (; k < span.chunks; k += step) add(sums[0], load<N>(span.chunk(k)));
  if (me < span.edge) {
    const float x = to_float(data[span.at_edge(me)]);
    sums[1] = fmaf(x, x, sums[1]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class List>
MK_KERNEL __launch_bounds__(kThreads) void squares_kernel(const MK_GRID_CONSTANT List list, int piece, float* sums) {
  SharedMemory shared;
  BlockScratch<> scratch(shared);
  const int tensor = list.owner(int(blockIdx.x));
  const int64_t* row = list.rows[tensor];
  const int64_t start = int64_t(int(blockIdx.x) - list.first[tensor]) * piece, left = row[kCount] - start;
  const int count = int(left < piece ? left : piece);
  float sum;
  switch (Dtype(row[kDtype])) {
    case Dtype::f32: sum = squares(reinterpret_cast<const float*>(row[kAddress]) + start, count); break;
    case Dtype::bf16: sum = squares(reinterpret_cast<const bf16*>(row[kAddress]) + start, count); break;
    default: sum = squares(reinterpret_cast<const fp16*>(row[kAddress]) + start, count);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

MK_KERNEL __launch_bounds__(kTotalThreads) void total_kernel(const float* sums, int count, float* out) {
  SharedMemory shared;
  BlockScratch<> scratch(shared);
  float sum = 0.0f;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) sum += sums[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *out = sum;
}

}  // namespace

// --- launchers ---

void sum_of_squares(const SumOfSquares& p, Place place) {
  Checks check("sum_of_squares");
  check.size("tensors", p.tensors);
  check.size("piece", p.piece, 1, int64_t(1) << 30);
  check.size("count", p.count, 0, kMostBlocks);
  check.require(p.table || !p.tensors, "the address of table is null");
  int64_t pieces = 0;
  for (int64_t tensor = 0; tensor < p.tensors; ++tensor) {
    const int64_t* row = p.table + tensor * kColumns;
    check.floating(Dtype(row[kDtype]));
    check_address(check, "tensor", tensor, row[kAddress], size_of(Dtype(row[kDtype])));
    check.size("the number of elements of a tensor", row[kCount], 1);
    const int64_t sums = int64_t(p.sums), out = int64_t(p.out), bytes = row[kCount] * size_of(Dtype(row[kDtype]));
    check_apart(check, tensor, "tensor", row[kAddress], bytes, "sums", sums, p.count * 4);
    check_apart(check, tensor, "tensor", row[kAddress], bytes, "out", out, 4);
    pieces += pieces_of(row[kCount], p.piece);
  }
  check.require(pieces == p.count, "count must be the number of pieces, " + std::to_string(pieces) + ", got " +
                                       std::to_string(p.count));
  check.writes("sums", p.sums, Dtype::f32, p.count);
  check.writes("out", p.out, Dtype::f32, 1);
  each_list<kColumns, kCount>(check, p.table, p.tensors, p.piece, [&](const auto& list, int pieces, int64_t before) {
    using List = std::decay_t<decltype(list)>;
    MK_LAUNCH(squares_kernel<List>, dim3(pieces), dim3(kThreads), BlockScratch<>::bytes, place, list, int(p.piece),
              p.sums + before);
  });
  MK_LAUNCH(total_kernel, dim3(1), dim3(kTotalThreads), BlockScratch<>::bytes, place, p.sums, int(p.count), p.out);
}

}  // namespace megakern
