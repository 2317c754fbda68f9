// The matrix products of a linear layer: y = act(x W^T + bias) + residual, or gated by a second product; dx = dy W, with
// the derivative of what came before; dW (+)= dy^T x; dbias.
//
// Writes: out and pre whole (=), or out += with Layout::tn, in fp32 and rounded once. Same bits at each run: what blocks share is added in a fixed order.
// Parallel: persistent blocks of a producer and two consumer warpgroups own tiles of out; the kernel is in product.cuh.
// Limits: sm_90a; bf16 and fp16; rows on multiples of 16 bytes, so N and K that 8 divides; sizes below 2^31.
#include <algorithm>
#include <tuple>

#include "device/checks.h"
#include "product.cuh"

namespace megakern {

// --- tiles ---

// megakern/kernels/cuda/linear_plan.py chooses among them.
using Tiles = std::tuple<ProductTile<128, 256, 4, 1, false>, ProductTile<128, 256, 4, 2, false>,
                         ProductTile<128, 128, 6, 1, true>, ProductTile<128, 128, 6, 2, true>,
                         ProductTile<128, 192, 4, 1, true>, ProductTile<128, 160, 4, 1, true>, ProductTile<64, 128, 8, 1, true>>;

// f(Tile{}) for the tile shape that the problem names.
template <int I = 0, class F>
void with_tile(const Checks& check, const LinearProduct& p, F f) {
  if constexpr (I < int(std::tuple_size_v<Tiles>)) {
    using Tile = std::tuple_element_t<I, Tiles>;
    if (p.tile_rows == Tile::rows && p.tile_cols == Tile::cols && p.cluster == Tile::cluster) return f(Tile{});
    with_tile<I + 1>(check, p, f);
  } else {
    check.require(false, "there is no tile of " + std::to_string(p.tile_rows) + " x " + std::to_string(p.tile_cols) +
                             " in clusters of " + std::to_string(p.cluster));
  }
}

// --- kernels ---

// Block (i, j): columns 256 i to 256 i + 255 of rows j, j + P, ... in groups of 8; row j of the parts. 8 columns a
// thread; the 8 warps take rows in turn, and their sums are added in shared memory.
template <class T>
MK_KERNEL void column_sums_kernel(ColumnSums p) {
  SharedMemory shared;
  float* sums = shared.take<float>(8 * 256);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t col = int64_t(blockIdx.x) * 256 + lane * 8;
  Vector<float, 8> total = filled<float, 8>(0.0f);
  if (col < p.N) {
    const T* x = static_cast<const T*>(p.x) + col;
#pragma unroll 4
    for (int64_t row = int64_t(blockIdx.y) * 8 + warp; row < p.M; row += int64_t(gridDim.y) * 8) {
      const Vector<float, 8> values = to_float(load<8>(x + row * p.x_stride));
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] += values[i];
    }
  }
  store_shared(sums + warp * 256 + lane * 8, total);
  sync_block();
  float sum = 0;
  for (int w = 0; w < 8; ++w) sum += sums[w * 256 + threadIdx.x];
  const int64_t own = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (own < p.N) p.parts[blockIdx.y * p.N + own] = sum;
}

// A block: 32 columns, a lane each; its 8 warps take the parts in turn, and their sums are added in shared memory.
template <class T>
MK_KERNEL void part_sums_kernel(PartSums p) {
  SharedMemory shared;
  float* sums = shared.take<float>(256);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t col = int64_t(blockIdx.x) * kWarp + lane;
  float sum = 0;
  if (col < p.N) {
#pragma unroll 8
    for (int64_t j = warp; j < p.P; j += 8) sum += p.parts[j * p.N + col];
  }
  sums[threadIdx.x] = sum;
  sync_block();
  if (warp || col >= p.N) return;
  for (int w = 1; w < 8; ++w) sum += sums[w * kWarp + lane];
  static_cast<T*>(p.out)[col] = from_float<T>(sum);
}

// --- launchers ---

// Of the output; those of a cluster as one.
int64_t tiles_of(const LinearProduct& p) {
  const int cols = p.layout == Layout::gated ? p.tile_cols / 2 : p.tile_cols;
  return ceil_div(p.M, int64_t(p.tile_rows) * p.cluster) * ceil_div(p.N, int64_t(cols));
}

template <class T, class Out, Layout L, class Tile>
void launch_product(const LinearProduct& p, Place place) {
  constexpr bool along_k = L == Layout::nt || L == Layout::gated;  // b's rows, as a's
  constexpr int cols = L == Layout::gated ? Tile::cols / 2 : Tile::cols, width = 128 / int(sizeof(Out));
  const TensorMap a = L == Layout::tn ? matrix_map(p.a, p.dtype, p.K, p.M, p.a_stride, Tile::depth, 64, Swizzle::b128)
                                      : matrix_map(p.a, p.dtype, p.M, p.K, p.a_stride, Tile::rows, 64, Swizzle::b128);
  const auto b_map = [&](const void* b, int64_t stride) {
    return along_k ? matrix_map(b, p.dtype, p.N, p.K, stride, cols / Tile::cluster, 64, Swizzle::b128)
                   : matrix_map(b, p.dtype, p.K, p.N, stride, Tile::depth / Tile::cluster, 64, Swizzle::b128);
  };
  const TensorMap b = b_map(p.b, p.b_stride), up = p.b_up ? b_map(p.b_up, p.b_up_stride) : b;
  const TensorMap out = matrix_map(p.out, p.out_dtype, p.M, p.N, p.out_stride, 16, width, Swizzle::b128);
  const auto dense_map = [&](void* to) {
    return to ? matrix_map(to, p.dtype, p.M, p.N, p.N, 16, width, Swizzle::b128) : out;
  };
  const TensorMap second = dense_map(p.pre ? p.pre : p.out_up), third = dense_map(p.pre_up);
  const int64_t tasks = p.whole + (tiles_of(p) - p.whole) * p.splits;
  const int64_t clusters = std::min<int64_t>(tasks, std::max(1, p.blocks / Tile::cluster));
  const bool by_tma = p.accumulate && sizeof(Out) == 4, read = p.accumulate && !by_tma;  // out as it was
  const Follows follows = {{p.bias, p.bias_up},
                           {read ? p.out : p.residual ? p.residual : p.saved, p.saved_up},
                           {read ? p.out_stride : p.residual ? p.residual_stride : p.saved_stride, p.saved_up_stride},
                           int(p.M), int(p.N), p.activation, p.bias_dtype == Dtype::f32, p.pre != nullptr, by_tma};
  const Product product = {follows, int(p.K), std::max(1, p.band / (Tile::rows * Tile::cluster)), p.head_start,
                           p.sums, int(p.whole), p.splits, p.parts, p.arrivals};
  MK_LAUNCH_CLUSTER((product_kernel<T, Out, L, Tile>), dim3(unsigned(clusters * Tile::cluster)), dim3(kPipelineThreads),
                    Tile::shared, Tile::cluster, place, a, b, up, out, second, third, product);
}

template <class T>
void with_kernel(const Checks& check, const LinearProduct& p, Place place) {
  with_tile(check, p, [&](auto tile) {
    using Tile = decltype(tile);
    const bool parts = p.layout == Layout::nt ? kSplits<Tile, Layout::nt> : p.layout == Layout::tn && kSplits<Tile, Layout::tn>;
    check.require(parts || p.splits == 1, "this tile and layout are not split along K: splits must be 1, got " +
                                              std::to_string(p.splits));
    const bool wide = p.out_dtype == Dtype::f32;
    if (p.layout == Layout::nt) launch_product<T, T, Layout::nt, Tile>(p, place);
    else if (p.layout == Layout::nn) launch_product<T, T, Layout::nn, Tile>(p, place);
    else if (p.layout == Layout::gated) {
      if constexpr (Tile::cluster == 1 && Tile::cols % 64 == 0) launch_product<T, T, Layout::gated, Tile>(p, place);
      else check.require(false, "layout 3 is for tiles of single blocks, and of columns that 64 divides");
    } else if (wide) launch_product<T, float, Layout::tn, Tile>(p, place);
    else launch_product<T, T, Layout::tn, Tile>(p, place);
  });
}

// Throws unless what is there besides a, b and out belongs to the layout.
void check_follows(const Checks& check, const LinearProduct& p) {
  const bool gated = p.layout == Layout::gated, nt = p.layout == Layout::nt, nn = p.layout == Layout::nn;
  const auto absent = [&](const char* name, const void* pointer) {
    check.require(!pointer, std::string(name) + " does not go with layout " + std::to_string(int(p.layout)));
  };
  if (!gated) absent("b_up", p.b_up), absent("bias_up", p.bias_up), absent("pre_up", p.pre_up);
  if (!nt && !gated) absent("bias", p.bias), absent("pre", p.pre);
  if (!nt && !nn) absent("residual", p.residual);
  if (p.layout != Layout::tn) absent("sums", p.sums);
  if (!nn) absent("saved", p.saved), absent("saved_up", p.saved_up), absent("out_up", p.out_up);
  check.require(p.activation >= -1 && p.activation <= int(Activation::silu),
                "activation must be -1 to 3, got " + std::to_string(p.activation));
  check.require(p.activation < 0 || nt || nn, "an activation goes with layouts 0 and 1 alone");
  check.require(!gated || (!p.bias == !p.bias_up && !p.pre == !p.pre_up), "bias_up goes with bias, pre_up with pre");
  if (!nn) return;
  check.require(!p.saved_up == !p.out_up, "out_up goes with saved_up");
  check.require(!p.saved == (p.activation < 0 && !p.saved_up), "saved goes with an activation or saved_up");
  check.require(!p.saved || !p.residual, "there is no residual beside saved");
  check.require(p.activation < 0 || !p.saved_up, "there is no activation beside saved_up");
}

void linear_product(const LinearProduct& p, Place place) {
  Checks check("linear_product");
  check.require(p.dtype == Dtype::bf16 || p.dtype == Dtype::f16,
                "dtype must be code 1 (bf16) or 2 (fp16), got " + std::to_string(int(p.dtype)));
  check.known("layout", p.layout, Layout::gated);
  const bool wide = p.out_dtype == Dtype::f32;
  if (!wide) check.same("out", p.out_dtype, p.dtype);
  check.require(!wide || p.layout == Layout::tn, "out may be fp32 (code 0) with layout 2 alone");
  check.require(!p.accumulate || p.layout == Layout::tn, "out is accumulated into with layout 2 alone");
  check_follows(check, p);
  constexpr int64_t most = (int64_t(1) << 31) - 1024;  // coordinates of the last tile fit 32 bits
  check.size("M", p.M, 1, most), check.size("N", p.N, 1, most), check.size("K", p.K, 1, most);
  check.size("band", p.band, 1, most), check.size("head_start", p.head_start, 0, 3), check.size("blocks", p.blocks, 1, kMostBlocks);
  check.size("tile_rows", p.tile_rows, 1, 256), check.size("tile_cols", p.tile_cols, 2, 256);
  check.size("cluster", p.cluster, 1, 8), check.size("splits", p.splits, 1, std::min<int64_t>(32, ceil_div<int64_t>(p.K, 64)));
  check.size("whole", p.whole, p.splits == 1 ? tiles_of(p) : 0, tiles_of(p));
  if (const int64_t split = (tiles_of(p) - p.whole) * p.cluster) {
    check.writes("parts", p.parts, Dtype::f32, split * p.splits * p.tile_rows * p.tile_cols);
    check.writes("arrivals", p.arrivals, Dtype::i32, split * 4);
  }
  const auto on_16_bytes = [&](const char* name, const void* pointer, int64_t stride, Dtype dtype) {
    check.require(vectors_fit(pointer, stride * size_of(dtype)),
                  std::string("the rows of ") + name + " must start on multiples of 16 bytes");
  };
  const auto reads = [&](const char* name, const void* pointer, int64_t rows, int64_t cols, int64_t stride) {
    if (!pointer) return;
    check.require(stride > 0, std::string("the stride of ") + name + " must be above 0");  // as TMA wants it
    check.reads(name, pointer, p.dtype, rows, cols, stride), on_16_bytes(name, pointer, stride, p.dtype);
  };
  const bool a_across = p.layout == Layout::tn, b_across = p.layout == Layout::nn || p.layout == Layout::tn;
  check.require(p.a && p.b && (p.layout != Layout::gated || p.b_up), "a, b and with layout 3 b_up must not be null");
  reads("a", p.a, a_across ? p.K : p.M, a_across ? p.M : p.K, p.a_stride);
  reads("b", p.b, b_across ? p.K : p.N, b_across ? p.N : p.K, p.b_stride);
  reads("b_up", p.b_up, p.N, p.K, p.b_up_stride);
  reads("residual", p.residual, p.M, p.N, p.residual_stride);
  reads("saved", p.saved, p.M, p.N, p.saved_stride), reads("saved_up", p.saved_up, p.M, p.N, p.saved_up_stride);
  if (p.bias && p.bias_dtype != Dtype::f32) check.same("bias", p.bias_dtype, p.dtype);
  for (const void* bias : {p.bias, p.bias_up}) {
    if (bias) check.reads("bias", bias, p.bias_dtype, p.N), on_16_bytes("bias", bias, 0, p.bias_dtype);
  }
  check.writes("out", p.out, p.out_dtype, p.M, p.N, p.out_stride), on_16_bytes("out", p.out, p.out_stride, p.out_dtype);
  const auto writes = [&](const char* name, void* pointer) {
    if (pointer) check.writes(name, pointer, p.dtype, p.M, p.N, p.N), on_16_bytes(name, pointer, p.N, p.dtype);
  };
  writes("out_up", p.out_up), writes("pre", p.pre), writes("pre_up", p.pre_up);
  if (p.sums) check.writes("sums", p.sums, Dtype::f32, 4 * p.splits, p.M, p.M);
  check.require(!p.sums || p.M % 8 == 0, "M must be a multiple of 8 for sums, got " + std::to_string(p.M));
  if (p.dtype == Dtype::bf16) with_kernel<bf16>(check, p, place);
  else with_kernel<fp16>(check, p, place);
}

void column_sums(const ColumnSums& p, Place place) {
  Checks check("column_sums");
  check.floating(p.dtype);
  check.size("M", p.M, 1), check.size("N", p.N, 1), check.size("P", p.P, 1, 65535);
  check.reads("x", p.x, p.dtype, p.M, p.N, p.x_stride);
  check.writes("parts", p.parts, Dtype::f32, p.P, p.N, p.N);
  check.require(size_of(p.dtype) == 2 && p.N % 8 == 0 && vectors_fit(p.x, p.x_stride * 2),
                "x must be bf16 or fp16 (code 1 or 2) in rows that start and end on multiples of 16 bytes");
  const dim3 grid(check.blocks(ceil_div(p.N, int64_t(256))), unsigned(p.P));
  const std::size_t shared = shared_bytes<float>(8 * 256);
  if (p.dtype == Dtype::bf16) MK_LAUNCH(column_sums_kernel<bf16>, grid, dim3(256), shared, place, p);
  else MK_LAUNCH(column_sums_kernel<fp16>, grid, dim3(256), shared, place, p);
}

void part_sums(const PartSums& p, Place place) {
  Checks check("part_sums");
  check.floating(p.out_dtype, "out_dtype");
  check.size("N", p.N, 1), check.size("P", p.P, 1);
  check.reads("parts", p.parts, Dtype::f32, p.P, p.N, p.N);
  check.writes("out", p.out, p.out_dtype, p.N);
  const unsigned blocks = check.blocks(ceil_div(p.N, int64_t(kWarp)));
  with_dtype(p.out_dtype, [&](auto zero) {
    MK_LAUNCH(part_sums_kernel<decltype(zero)>, dim3(blocks), dim3(256), shared_bytes<float>(256), place, p);
  });
}

}  // namespace megakern
