// Matrix products of linear layers on AMX: bf16 operands, fp32 sums, with what precedes and follows in the same pass.
//
//   linear           y = act(x w + bias) + residual; fp32 weights are rounded to bf16 while they are packed
//   weight_gradient  out (+)= dy^T x in fp32 or bf16, and the sums over the rows of dy
//
// Writes with =, weight_gradient with += on request. The right operand is packed into tiles, in strips of 32 columns; a
// thread takes a block of the result, and keeps in its cache kDepth of the summed dimension of the left operand, and of
// one strip of the right one. The sum of an element is made in the order of the summed dimension, in one chain, whatever
// the blocks are: results do not depend on the number of threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "checks.h"

#if defined(__x86_64__)
#define MEGAKERN_AVX512_BF16
#include "activation.h"
#include "amx.h"

namespace megakern {
namespace {

constexpr int64_t kSide = 32;         // rows and columns of the result made at a time: 2 x 2 tiles
constexpr int64_t kDepth = 512;       // of the summed dimension between two visits to the result: a panel is 32 KiB
constexpr int64_t kRows = 256;        // of a block of the result
constexpr int64_t kColumns = 512;     // of a block
constexpr int64_t kStep = 2 * kTile;  // units of a panel for 32 of the summed dimension: two tiles
constexpr int64_t kSquare = kSide * kSide;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
int64_t steps_of(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(T), 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// c (32, 32) = or += a (32, 32 steps) b (32 steps, 32), both packed.
template <bool add>
MEGAKERN_INLINE void multiply(const Unit* a, const Unit* b, int64_t steps, float* c) {
  constexpr int64_t c_stride = kSide * sizeof(float);
  float* lower = c + kTileRows * kSide;
  if constexpr (add) {
    tile_load<0>(c, c_stride), tile_load<1>(c + kTileUnits, c_stride);
    tile_load<2>(lower, c_stride), tile_load<3>(lower + kTileUnits, c_stride);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (int64_t s = 0; s < steps; ++s, a += kStep, b += kStep) {
    tile_load<4>(a, 64);
    tile_load<6>(b, 64);
    tile_multiply_add<0, 4, 6>();
    tile_load<7>(b + kTile, 64);
    tile_multiply_add<1, 4, 7>();
    tile_load<5>(a + kTile, 64);
    tile_multiply_add<2, 5, 6>();
    tile_multiply_add<3, 5, 7>();
  }
  tile_store<0>(c, c_stride), tile_store<1>(c + kTileUnits, c_stride);
  tile_store<2>(lower, c_stride), tile_store<3>(lower + kTileUnits, c_stride);
}

// --- packing ---

using Units = __m512i;

MEGAKERN_INLINE Mask some(int64_t count) { return count <= 0 ? Mask(0) : first_lanes(count); }

// 32 bf16 from p on, of which `count` are there and the others 0.
MEGAKERN_INLINE Units load_32(const bf16* p, int64_t count) {
  const __mmask32 m = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << std::max<int64_t>(count, 0)) - 1;
  return _mm512_maskz_loadu_epi16(m, p);
}
MEGAKERN_INLINE Units load_32(const float* p, int64_t count) {
  return (Units)_mm512_cvtne2ps_pbh(load(p + kLanes, some(count - kLanes)), load(p, some(count)));
}

// A panel is what multiplies at a time: `steps` pairs of tiles, kStep units each; zeros where x has no element.

// Panels of 32 rows of x, summed over its columns: the left operand. Panels are `steps` apart.
void pack_left(const bf16* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, Unit* to) {
  for (int64_t r = 0; r < round_up(rows, kSide); ++r) {
    Unit* place = to + r / kSide * steps * kStep + r % kSide * kTileUnits;
    for (int64_t s = 0; s < steps; ++s)
      _mm512_store_si512(place + s * kStep, r < rows ? load_32(x + r * stride + s * kTileDepth, columns - s * kTileDepth)
                                                     : _mm512_setzero_si512());
  }
}

// Panels of 32 columns of x, summed over its rows: the right operand. Panels are `apart` units apart.
template <typename T>
void pack_right(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, Unit* to, int64_t apart) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t r = 0; r < steps * kTileDepth; r += 2) {
    Unit* place = to + r / kTileDepth * kStep + r % kTileDepth / 2 * kTileUnits;
    for (int64_t c = 0; c < columns; c += kSide, place += apart) {
      const Units even = r < rows ? load_32(x + r * stride + c, columns - c) : _mm512_setzero_si512();
      const Units odd = r + 1 < rows ? load_32(x + (r + 1) * stride + c, columns - c) : _mm512_setzero_si512();
      _mm512_store_si512(place, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(place + kTile, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

// One panel of the transpose of x: its rows (up to 32) are the columns, its columns are summed over.
template <typename T>
void pack_right_transposed(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, Unit* to) {
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t half = 0; half < 2; ++half) {
      Units lines[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t r = half * 16 + i;
        lines[i] = r < rows ? load_32(x + r * stride + s * kTileDepth, columns - s * kTileDepth)
                            : _mm512_setzero_si512();
      }
      transpose_16(lines);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + s * kStep + half * kTile + i * kTileUnits, lines[i]);
    }
}

// Panels of 32 columns of x, summed over its rows: the left operand of x^T. sums += the sums over rows, if not null.
void pack_left_transposed(const bf16* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, Unit* to,
                          float* sums) {
  const __m512i odd_half = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t c = 0; c < round_up(columns, kSide); c += kLanes) {
      const Mask m = some(columns - c);
      Units lines[16];
      Vec even_sum = _mm512_setzero_ps(), odd_sum = _mm512_setzero_ps();
      for (int64_t u = 0; u < kTileUnits; ++u) {
        const int64_t r = s * kTileDepth + 2 * u;
        const bf16* p = x + r * stride + c;
        const __m256i even = _mm256_maskz_loadu_epi16(r < rows ? m : Mask(0), r < rows ? p : x);
        const __m256i odd = _mm256_maskz_loadu_epi16(r + 1 < rows ? m : Mask(0), r + 1 < rows ? p + stride : x);
        lines[u] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
        even_sum = _mm512_add_ps(even_sum, _mm512_castsi512_ps(_mm512_slli_epi32(lines[u], 16)));
        odd_sum = _mm512_add_ps(odd_sum, _mm512_castsi512_ps(_mm512_and_si512(lines[u], odd_half)));
      }
      if (sums) store(sums + c, _mm512_add_ps(load(sums + c), _mm512_add_ps(even_sum, odd_sum)));
      transpose_16(lines);
      Unit* place = to + (c / kSide * steps + s) * kStep + c % kSide * kTileUnits;
      for (int64_t i = 0; i < kLanes; ++i) _mm512_store_si512(place + i * kTileUnits, lines[i]);
    }
}

// --- y = act(x w + bias) + residual ---

template <int kind>
struct Finish {  // what happens to a (32, 32) square of sums
  const float* bias;
  const bf16* residual;
  bf16 *pre, *y;
  int64_t N;

  // Ask for the memory that the square is written to, while it is made: without, a store waits for each line of y.
  MEGAKERN_INLINE void fetch(int64_t row, int64_t rows, int64_t column) const {
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_prefetch(y + (row + r) * N + column, 1);
      if (pre) __builtin_prefetch(pre + (row + r) * N + column, 1);
      if (residual) __builtin_prefetch(residual + (row + r) * N + column, 0);
    }
  }

  MEGAKERN_INLINE void operator()(const float* c, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const Mask masks[2] = {some(columns), some(columns - kLanes)};
    const __mmask32 both = _mm512_kunpackw(masks[1], masks[0]);
    Vec biases[2];
    for (int n = 0; n < 2; ++n)
      biases[n] = bias ? load(bias + column + n * kLanes, masks[n]) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = (row + r) * N + column;
      Vec x[2];
      for (int n = 0; n < 2; ++n) x[n] = _mm512_add_ps(_mm512_load_ps(c + r * kSide + n * kLanes), biases[n]);
      if (pre) _mm512_mask_storeu_epi16(pre + i, both, (Units)_mm512_cvtne2ps_pbh(x[1], x[0]));
      for (int n = 0; n < 2; ++n) {
        x[n] = activate<kind, kFast>(x[n]);
        if (residual) x[n] = _mm512_add_ps(x[n], load(residual + i + n * kLanes, masks[n]));
      }
      _mm512_mask_storeu_epi16(y + i, both, (Units)_mm512_cvtne2ps_pbh(x[1], x[0]));
    }
  }
};

template <typename W, int kind>
void linear(const LinearProblem& a, const bf16* x, const W* w, Finish<kind> finish) {
  const int64_t strips = (a.N + kSide - 1) / kSide, steps = steps_of(a.K), apart = steps * kStep;
  const int64_t rows_of_block = std::min(kRows, round_up((a.M + a.threads - 1) / a.threads, kSide));
  const int64_t blocks = (a.M + rows_of_block - 1) / rows_of_block;
  const bool once = a.K <= kDepth;
  const Buffer<Unit> packed(strips * apart);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t columns = std::min(kSide, a.N - i * kSide);
      Unit* to = packed.get() + i * apart;
      if (a.transposed) pack_right_transposed(w + i * kSide * a.K, a.K, columns, a.K, steps, to);
      else pack_right(w + i * kSide, a.N, a.K, columns, steps, to, apart);
    }
    const TileConfig config;
    const Buffer<Unit> left(rows_of_block * kDepth / 2);
    const Buffer<float> sums(once ? 2 * kSquare : rows_of_block * strips * kSide);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * rows_of_block, rows = std::min(rows_of_block, a.M - first);
      const int64_t panels = (rows + kSide - 1) / kSide;
      for (int64_t k = 0; k < a.K; k += kDepth) {
        const int64_t depth = std::min(kDepth, a.K - k), here = steps_of(depth);
        pack_left(x + first * a.x_stride + k, a.x_stride, rows, depth, here, left.get());
        for (int64_t group = 0; group < strips; group += kColumns / kSide)
          for (int64_t p = 0; p < panels; ++p)
            for (int64_t i = group; i < std::min(strips, group + kColumns / kSide); ++i) {
              const int64_t row = first + p * kSide, height = std::min(kSide, rows - p * kSide);
              const Unit* right = packed.get() + i * apart + k / kTileDepth * kStep;
              float* c = sums.get() + (once ? i % 2 : i * panels + p) * kSquare;
              const bool last = k + depth == a.K;
              if (last) finish.fetch(row, height, i * kSide);
              if (k == 0) multiply<false>(left.get() + p * here * kStep, right, here, c);
              else multiply<true>(left.get() + p * here * kStep, right, here, c);
              if (last) finish(c, row, height, i * kSide, std::min(kSide, a.N - i * kSide));
            }
      }
    }
  }
}

// --- out (+)= dy^T x ---

template <typename T>
void weight_gradient(const WeightGradientProblem& a, const bf16* dy, const bf16* x, T* out, float* sums) {
  const int64_t rows_of_block = std::min(kRows, round_up((a.N + a.threads - 1) / a.threads, kSide));
  const int64_t row_blocks = (a.N + rows_of_block - 1) / rows_of_block;
  const int64_t column_blocks = (a.K + kColumns - 1) / kColumns;
  const int64_t columns_of_block = std::min(kColumns, round_up(a.K, kSide));
#pragma omp parallel num_threads(a.threads)
  {
    const TileConfig config;
    const Buffer<Unit> left(rows_of_block * kDepth / 2), right(columns_of_block * kDepth / 2);
    const Buffer<float> c(rows_of_block * columns_of_block), totals(rows_of_block);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < row_blocks * column_blocks; ++block) {
      const int64_t first = block % row_blocks * rows_of_block, rows = std::min(rows_of_block, a.N - first);
      const int64_t column = block / row_blocks * kColumns, columns = std::min(kColumns, a.K - column);
      const int64_t panels = (rows + kSide - 1) / kSide, strips = (columns + kSide - 1) / kSide;
      const bool with_sums = sums != nullptr && column == 0;
      std::fill_n(totals.get(), rows_of_block, 0.0f);
      for (int64_t m = 0; m < a.M; m += kDepth) {
        const int64_t depth = std::min(kDepth, a.M - m), here = steps_of(depth), apart = here * kStep;
        pack_left_transposed(dy + m * a.dy_stride + first, a.dy_stride, depth, rows, here, left.get(),
                             with_sums ? totals.get() : nullptr);
        pack_right(x + m * a.x_stride + column, a.x_stride, depth, columns, here, right.get(), apart);
        for (int64_t i = 0; i < strips; ++i)
          for (int64_t p = 0; p < panels; ++p) {
            float* square = c.get() + (i * panels + p) * kSquare;
            if (m == 0) multiply<false>(left.get() + p * apart, right.get() + i * apart, here, square);
            else multiply<true>(left.get() + p * apart, right.get() + i * apart, here, square);
          }
      }
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t r = 0; r < std::min(kSide, rows - p * kSide); ++r)
          for (int64_t n = 0; n < columns; n += kLanes) {
            T* place = out + (first + p * kSide + r) * a.K + column + n;
            Vec sum = _mm512_load_ps(c.get() + (n / kSide * panels + p) * kSquare + r * kSide + n % kSide);
            if (a.add) sum = _mm512_add_ps(sum, load(place, some(columns - n)));
            store(place, sum, some(columns - n));
          }
      if (with_sums) std::copy_n(totals.get(), rows, sums + first);
    }
  }
}

}  // namespace
}  // namespace megakern
#endif

namespace megakern {

void linear(const LinearProblem& a, Address x, Address weight, Address bias, Address residual, Address pre, Address y) {
  const char* op = "linear";
  require_positive(op, "M", a.M);
  require_positive(op, "N", a.N);
  require_positive(op, "K", a.K);
  require_positive(op, "threads", a.threads);
  require_dtype(op, a.weight_dtype);
  require(a.activation >= kNone && a.activation <= kSilu,
          "linear: activation code must be 0 to 4, got " + std::to_string(a.activation));
  require(a.x_stride >= a.K, "linear: the row stride of x must be at least K = " + std::to_string(a.K) + ", got " +
                                 std::to_string(a.x_stride));
  require_addressable(op, a.M, a.x_stride);
  require_addressable(op, a.M, a.N);
  require_addressable(op, a.N, a.K);
  require_address(op, "x", x, 2);
  require_address(op, "weight", weight, element_size(a.weight_dtype));
  require_address(op, "y", y, 2);
  if (bias) require_address(op, "bias", bias, 4);
  if (residual) require_address(op, "residual", residual, 2);
  if (pre) require_address(op, "pre", pre, 2);
  require(x != y && x != pre, "linear: x must not be an output");
#if defined(__x86_64__)
  const auto run = [&](auto kind) {
    const Finish<kind> finish{reinterpret_cast<const float*>(bias), reinterpret_cast<const bf16*>(residual),
                              reinterpret_cast<bf16*>(pre), reinterpret_cast<bf16*>(y), a.N};
    const bf16* rows = reinterpret_cast<const bf16*>(x);
    if (a.weight_dtype == kBFloat16) return linear(a, rows, reinterpret_cast<const bf16*>(weight), finish);
    return linear(a, rows, reinterpret_cast<const float*>(weight), finish);
  };
  switch (a.activation) {
    case kGelu: return run(std::integral_constant<int, kGelu>());
    case kGeluTanh: return run(std::integral_constant<int, kGeluTanh>());
    case kReluSquared: return run(std::integral_constant<int, kReluSquared>());
    case kSilu: return run(std::integral_constant<int, kSilu>());
    default: return run(std::integral_constant<int, kNone>());
  }
#else
  require(false, "linear: compiled for x86-64 only");
#endif
}

void weight_gradient(const WeightGradientProblem& a, Address dy, Address x, Address out, Address sums) {
  const char* op = "weight_gradient";
  require_positive(op, "M", a.M);
  require_positive(op, "N", a.N);
  require_positive(op, "K", a.K);
  require_positive(op, "threads", a.threads);
  require_dtype(op, a.dtype);
  require(a.dy_stride >= a.N && a.x_stride >= a.K, "weight_gradient: row strides must be at least N and K");
  require_addressable(op, a.M, a.dy_stride);
  require_addressable(op, a.M, a.x_stride);
  require_addressable(op, a.N, a.K);
  require_address(op, "dy", dy, 2);
  require_address(op, "x", x, 2);
  require_address(op, "out", out, element_size(a.dtype));
  if (sums) require_address(op, "sums", sums, 4);
#if defined(__x86_64__)
  const bf16 *rows = reinterpret_cast<const bf16*>(dy), *columns = reinterpret_cast<const bf16*>(x);
  float* by_row = reinterpret_cast<float*>(sums);
  if (a.dtype == kBFloat16) return weight_gradient(a, rows, columns, reinterpret_cast<bf16*>(out), by_row);
  return weight_gradient(a, rows, columns, reinterpret_cast<float*>(out), by_row);
#else
  require(false, "weight_gradient: compiled for x86-64 only");
#endif
}

}  // namespace megakern
