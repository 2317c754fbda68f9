// Matrix products of linear layers on AMX: bf16 operands, fp32 sums, with what precedes and follows in the same pass.
//
//   linear           y = act(x w^T + bias) + residual, or with w in place of w^T, as in a gradient of x; fp32 weights are
//                    rounded to bf16 while they are packed
//                    y = act'(pre) (x w), a gradient of what an activation read
//   weight_gradient  out (+)= dy^T x in fp32 or bf16, and the sums over the rows of dy
//
// Writes with =, weight_gradient with += on request. Operands are packed into panels of tiles, 32 rows or columns wide,
// but for rows of x whose lines of 64 bytes tiles can read as they lie; a thread takes a block of the result and packs
// its left operand, in weight_gradient the right one too. The sum of an element is made in the order of the summed
// dimension, in one chain, whatever the blocks are: results do not depend on the number of threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "checks.h"

namespace megakern {
namespace {
constexpr int64_t kDeepest = 4096;  // largest K of linear: its sums never leave the tiles
}  // namespace
}  // namespace megakern

#if defined(__x86_64__)
#define MEGAKERN_AVX512_BF16
#include "activation.h"
#include "amx.h"

namespace megakern {
namespace {

constexpr int64_t kSide = 32;         // rows and columns of the result made at a time: 2 x 2 tiles
constexpr int64_t kSquare = kSide * kSide;
constexpr int64_t kStep = 2 * kTile;  // units of a panel for 32 of the summed dimension: two tiles

// A block of y: at most so many rows of x, and so many units of them, beside the packed weight in 2 MB of L2.
constexpr int64_t kRows = 256, kBlockUnits = 1 << 17;
constexpr int64_t kResident = 3 << 17;  // units of a packed weight that stays in L2 beside them

// The rows of dy and x between two visits to the sums of a block of a weight gradient; the bytes of both, packed, with
// those of the sums, which stay in 2 MB of L2; and the least rows of a block, where there are more. ms of the seven
// gradients of two GPTs, 384 and 768 wide: depth 128 18.7, 192 18.0, 256 17.8, 384 20.6, 512 21.8.
constexpr int64_t kGradientDepth = 256, kGradientBytes = 1800 << 10, kFewestGradientRows = 128;
constexpr int64_t kPackedAsProducts = 100;  // to pack an element takes about as long as so many products

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

// 32 rows of a left operand, as tiles read them.
struct Left {
  const Unit* units;
  int64_t stride;       // bytes from one row to the next
  int64_t lower, step;  // units from the first row to row 16, and to the next 32 of the summed dimension
};
Left packed(const Unit* panel) { return {panel, 4 * kTileUnits, kTile, kStep}; }
Left as_it_lies(const bf16* x, int64_t stride) {
  return {reinterpret_cast<const Unit*>(x), 2 * stride, kTileRows * stride / 2, kTileUnits};
}

// c (32, 32) = or += a (32, 32 steps) b (32 steps, 32), b packed. `beside(step)` runs between the steps: the tiles
// leave the vector units idle, and no instruction window reaches over the products of a square.
template <bool add, class Beside>
MEGAKERN_INLINE void multiply(const Left& left, const Unit* b, int64_t steps, float* c, const Beside& beside) {
  constexpr int64_t c_stride = kSide * sizeof(float);
  float* lower = c + kTileRows * kSide;
  if constexpr (add) {
    tile_load<0>(c, c_stride), tile_load<1>(c + kTileUnits, c_stride);
    tile_load<2>(lower, c_stride), tile_load<3>(lower + kTileUnits, c_stride);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  const Unit* a = left.units;
  for (int64_t s = 0; s < steps; ++s, a += left.step, b += kStep) {
    tile_load<4>(a, left.stride);
    tile_load<6>(b, 64);
    tile_multiply_add<0, 4, 6>();
    tile_load<7>(b + kTile, 64);
    tile_multiply_add<1, 4, 7>();
    tile_load<5>(a + left.lower, left.stride);
    tile_multiply_add<2, 5, 6>();
    tile_multiply_add<3, 5, 7>();
    beside(s);
  }
  tile_store<0>(c, c_stride), tile_store<1>(c + kTileUnits, c_stride);
  tile_store<2>(lower, c_stride), tile_store<3>(lower + kTileUnits, c_stride);
}

struct Square {  // of sums: where it is, and where it belongs in the result
  const float* c = nullptr;
  int64_t row = 0, rows = 0, column = 0, columns = 0;
};

// Rows that are read next: fetched into L2, a few lines at a time, while tiles multiply.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const bf16* x, int64_t stride, int64_t rows, int64_t columns, int64_t lines)
      : row_(x), stride_(stride), rows_(rows), columns_(columns), lines_(lines) {}

  MEGAKERN_INLINE void fetch() {
    for (int64_t i = 0; i < lines_ && rows_ > 0; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(row_ + column_), _MM_HINT_T1);
      column_ += kTileDepth;
      if (column_ >= columns_) column_ = 0, row_ += stride_, --rows_;
    }
  }

 private:
  const bf16* row_ = nullptr;
  int64_t stride_ = 0, rows_ = 0, columns_ = 0, lines_ = 0, column_ = 0;
};

// Makes squares of the result; each is finished, row by row, while the next one is made.
template <class Finish>
class Pipeline {
 public:
  explicit Pipeline(const Finish& finish) : finish_(finish) {}

  // c = or += a b; with `last`, the square is to be finished then.
  MEGAKERN_INLINE void run(const Left& a, const Unit* b, int64_t steps, float* c, bool first, bool last, Square next) {
    const int64_t each = (waiting_.rows + steps - 1) / steps;
    const auto beside = [&](int64_t s) {
      const int64_t begin = s * each;
      if (begin < waiting_.rows) finish_(waiting_, begin, std::min(begin + each, waiting_.rows));
      ahead_.fetch();
    };
    if (first) multiply<false>(a, b, steps, c, beside);
    else multiply<true>(a, b, steps, c, beside);
    waiting_ = last ? next : Square();
  }

  // What to fetch from now on, some in each step.
  void fetch(const Ahead& ahead) { ahead_ = ahead; }

  void drain() {
    finish_(waiting_, 0, waiting_.rows);
    waiting_ = Square();
  }

 private:
  const Finish& finish_;
  Square waiting_;
  Ahead ahead_;
};

// --- packing ---

using Units = __m512i;

MEGAKERN_INLINE Mask some(int64_t count) { return count <= 0 ? Mask(0) : first_lanes(count); }

// 32 bf16 from p on, of which `count` are there and the others 0.
MEGAKERN_INLINE Units load_32(const bf16* p, int64_t count) {
  if (count >= 32) return _mm512_loadu_si512(p);
  const __mmask32 m = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << std::max<int64_t>(count, 0)) - 1;
  return _mm512_maskz_loadu_epi16(m, p);
}
MEGAKERN_INLINE Units load_32(const float* p, int64_t count) {
  if (count >= 32) return (Units)_mm512_cvtne2ps_pbh(load(p + kLanes), load(p));
  return (Units)_mm512_cvtne2ps_pbh(load(p + kLanes, some(count - kLanes)), load(p, some(count)));
}

// A panel is what multiplies at a time: `steps` pairs of tiles, kStep units each; zeros where x has no element.

// Panels of 32 rows of x, summed over its columns: the left operand. Panels are `steps` apart.
void pack_left(const bf16* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, Unit* to) {
  const int64_t full = columns / kTileDepth;
  for (int64_t r = 0; r < round_up(rows, kSide); ++r) {
    Unit* place = to + r / kSide * steps * kStep + r % kSide * kTileUnits;
    const bf16* row = x + r * stride;
    int64_t s = 0;
    for (; r < rows && s < full; ++s) _mm512_store_si512(place + s * kStep, _mm512_loadu_si512(row + s * kTileDepth));
    for (; s < steps; ++s)
      _mm512_store_si512(place + s * kStep, r < rows ? load_32(row + s * kTileDepth, columns - s * kTileDepth)
                                                     : _mm512_setzero_si512());
  }
}

// Panels of 32 columns of x, summed over its rows: the right operand. Panels are `apart` units apart.
template <typename T>
void pack_right(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, Unit* to, int64_t apart) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const auto put = [&](Units even, Units odd, Unit* place) {
    _mm512_store_si512(place, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_store_si512(place + kTile, _mm512_permutex2var_epi16(even, high, odd));
  };
  const Units zero = _mm512_setzero_si512();
  for (int64_t r = 0; r < steps * kTileDepth; r += 2) {
    Unit* place = to + r / kTileDepth * kStep + r % kTileDepth / 2 * kTileUnits;
    const T *even = x + r * stride, *odd = even + stride;
    int64_t c = 0;
    if (r + 1 < rows)
      for (; c + kSide <= columns; c += kSide, place += apart)
        put(load_32(even + c, kSide), load_32(odd + c, kSide), place);
    for (; c < columns; c += kSide, place += apart)
      put(r < rows ? load_32(even + c, columns - c) : zero, r + 1 < rows ? load_32(odd + c, columns - c) : zero, place);
  }
}

// One panel of the transpose of x: its rows (up to 32) are the columns, its columns are summed over.
template <typename T>
void pack_right_transposed(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, Unit* to) {
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t half = 0; half < 2; ++half) {
      Units lines[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t r = half * 16 + i;
        lines[i] = r < rows ? load_32(x + r * stride + s * kTileDepth, columns - s * kTileDepth)
                            : _mm512_setzero_si512();
      }
      transpose_16(lines);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + s * kStep + half * kTile + i * kTileUnits, lines[i]);
    }
}

// In which order unpacklo, unpackhi leave 32 columns: 16 of the low and 16 of the high halves of 128-bit lanes.
MEGAKERN_INLINE int64_t unpacked_column(int64_t half, int64_t i) { return i / 4 * 8 + half * 4 + i % 4; }

// Panels of 32 columns of x, summed over its rows: the left operand of x^T. sums (columns rounded up to 32) += the sums
// over rows, each 32 in the order of unpacked_column, if not null.
void pack_left_transposed(const bf16* x, int64_t stride, int64_t rows, int64_t columns, int64_t steps, Unit* to,
                          float* sums) {
  const Units ones = _mm512_set1_epi32(0x3F803F80);
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t c = 0; c < columns; c += kSide) {
      const bf16* block = x + s * kTileDepth * stride + c;
      const int64_t there = rows - s * kTileDepth;
      Units low[16], high[16];
      if (there >= kTileDepth && columns - c >= kSide) {
#pragma GCC unroll 16
        for (int64_t u = 0; u < kTileUnits; ++u) {
          const Units even = _mm512_loadu_si512(block + 2 * u * stride);
          const Units odd = _mm512_loadu_si512(block + (2 * u + 1) * stride);
          low[u] = _mm512_unpacklo_epi16(even, odd), high[u] = _mm512_unpackhi_epi16(even, odd);
        }
      } else {
        for (int64_t u = 0; u < kTileUnits; ++u) {
          const Units zero = _mm512_setzero_si512();
          const Units even = 2 * u < there ? load_32(block + 2 * u * stride, columns - c) : zero;
          const Units odd = 2 * u + 1 < there ? load_32(block + (2 * u + 1) * stride, columns - c) : zero;
          low[u] = _mm512_unpacklo_epi16(even, odd), high[u] = _mm512_unpackhi_epi16(even, odd);
        }
      }
      Unit* place = to + (c / kSide * steps + s) * kStep;
      const auto put = [&](Units(&lines)[16], int64_t half) {
        if (sums) {
          Vec sum = _mm512_setzero_ps();
          for (int64_t u = 0; u < kTileUnits; ++u) sum = _mm512_dpbf16_ps(sum, (__m512bh)lines[u], (__m512bh)ones);
          store(sums + c + half * kLanes, _mm512_add_ps(load(sums + c + half * kLanes), sum));
        }
        transpose_16(lines);
        for (int64_t i = 0; i < kLanes; ++i)
          _mm512_store_si512(place + unpacked_column(half, i) * kTileUnits, lines[i]);
      };
      put(low, 0), put(high, 1);
    }
}

// --- y = act(x w^T + bias) + residual ---

template <int kind, bool slope>
struct Finish {  // of rows of a square of sums; slope: they are multiplied by act'(pre)
  const float* bias;
  const bf16* residual;
  bf16 *pre, *y;
  int64_t N;

  MEGAKERN_INLINE void operator()(const Square& q, int64_t begin, int64_t end) const {
    const Mask masks[2] = {some(q.columns), some(q.columns - kLanes)};
    const __mmask32 both = _mm512_kunpackw(masks[1], masks[0]);
    Vec biases[2];
    for (int n = 0; n < 2; ++n)
      biases[n] = bias ? load(bias + q.column + n * kLanes, masks[n]) : _mm512_setzero_ps();
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = (q.row + r) * N + q.column;
      Vec x[2];
      for (int n = 0; n < 2; ++n) x[n] = _mm512_add_ps(_mm512_load_ps(q.c + r * kSide + n * kLanes), biases[n]);
      if (pre && !slope) _mm512_mask_storeu_epi16(pre + i, both, (Units)_mm512_cvtne2ps_pbh(x[1], x[0]));
      for (int n = 0; n < 2; ++n) {
        if constexpr (slope) x[n] = _mm512_mul_ps(x[n], derivative<kind, kFast>(load(pre + i + n * kLanes, masks[n])));
        else x[n] = activate<kind, kFast>(x[n]);
        if (residual) x[n] = _mm512_add_ps(x[n], load(residual + i + n * kLanes, masks[n]));
      }
      _mm512_mask_storeu_epi16(y + i, both, (Units)_mm512_cvtne2ps_pbh(x[1], x[0]));
    }
  }
};

template <typename W, class Finish>
void linear(const LinearProblem& a, const bf16* x, const W* w, const Finish& finish) {
  const int64_t strips = (a.N + kSide - 1) / kSide, steps = steps_of(a.K), apart = steps * kStep;
  const int64_t fitting = std::max(kSide, kBlockUnits / (steps * kTileUnits) / kSide * kSide);
  const int64_t rows_of_block = std::min({kRows, fitting, round_up((a.M + a.threads - 1) / a.threads, kSide)});
  const bool by_row = strips * apart <= kResident;  // else each panel of the weight is read once a block
  // Copying rows took 15 % of a product with K = 384, and 25 % with K = 1536.
  const bool lines = a.K % kTileDepth == 0 && a.x_stride % kTileDepth == 0 && reinterpret_cast<Address>(x) % 64 == 0;
  const Buffer<Unit> right(strips * apart);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t first = i * kSide, columns = std::min(kSide, a.N - first);
      Unit* to = right.get() + i * apart;
      if (a.transposed) pack_right(w + first, a.N, a.K, columns, steps, to, apart);
      else pack_right_transposed(w + first * a.K, a.K, columns, a.K, steps, to);
    }
    const TileConfig config;
    const Buffer<Unit> left(rows_of_block / kSide * apart);
    const Buffer<float> squares(2 * kSquare);
    Pipeline<Finish> pipeline(finish);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < a.M; first += rows_of_block) {
      const int64_t rows = std::min(rows_of_block, a.M - first), panels = (rows + kSide - 1) / kSide;
      const int64_t direct = lines ? rows / kSide : 0;  // panels that are not packed
      const bf16* const block = x + first * a.x_stride;
      if (direct < panels)
        pack_left(block + direct * kSide * a.x_stride, a.x_stride, rows - direct * kSide, a.K, steps,
                  left.get() + direct * apart);
      for (int64_t s = 0; s < panels * strips; ++s) {
        const int64_t p = by_row ? s / strips : s % panels, i = by_row ? s % strips : s / panels;
        const bf16* const own = block + p * kSide * a.x_stride;
        if (by_row && i == 0)
          pipeline.fetch({own + kSide * a.x_stride, a.x_stride, p + 1 < direct ? kSide : 0, a.K,
                          (kSide + strips - 1) / strips});
        float* c = squares.get() + s % 2 * kSquare;
        const Left rows_of_x = p < direct ? as_it_lies(own, a.x_stride) : packed(left.get() + p * apart);
        pipeline.run(rows_of_x, right.get() + i * apart, steps, c, true, true,
                     {c, first + p * kSide, std::min(kSide, rows - p * kSide), i * kSide,
                      std::min(kSide, a.N - i * kSide)});
      }
      pipeline.drain();
    }
  }
}

// --- out (+)= dy^T x ---

template <typename T>
struct Store {  // rows of a square of sums
  T* out;
  int64_t K;
  bool add;

  MEGAKERN_INLINE void operator()(const Square& q, int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t n = 0; n < q.columns; n += kLanes) {
        const Mask m = some(q.columns - n);
        T* place = out + (q.row + r) * K + q.column + n;
        Vec sum = _mm512_load_ps(q.c + r * kSide + n);
        if (add) sum = _mm512_add_ps(sum, load(place, m));
        store(place, sum, m);
      }
  }
};

struct Blocks {  // of a weight gradient (N, K)
  int64_t rows = 0, columns = 0;  // of each but the last
};

// What takes the least: dy is packed once a block of columns, x once a block of rows, and threads that have
// no block wait. No result depends on it.
Blocks blocks_of(const WeightGradientProblem& a) {
  Blocks best;
  double least = 0;
  const auto size = [](int64_t all, int64_t count) { return round_up((all + count - 1) / count, kSide); };
  for (int64_t r = 1; r <= std::max<int64_t>(a.N / kFewestGradientRows, a.threads); ++r)
    for (int64_t c = 1, tried = 0; tried <= a.threads && c <= (a.K + kSide - 1) / kSide; ++c) {
      const Blocks b{size(a.N, r), size(a.K, c)};
      if (4 * b.rows * b.columns + 2 * kGradientDepth * (b.rows + b.columns) > kGradientBytes) continue;
      const int64_t count = ((a.N + b.rows - 1) / b.rows) * ((a.K + b.columns - 1) / b.columns);
      const int64_t rounds = (count + a.threads - 1) / a.threads;
      const double packed = double(r) * a.K + double(c) * a.N, products = double(a.N) * a.K / kPackedAsProducts;
      const double cost = (packed + products) * rounds * a.threads / count;
      if (least == 0 || cost < least) least = cost, best = b;
      ++tried;
    }
  return best;
}

template <typename T>
void weight_gradient(const WeightGradientProblem& a, const bf16* dy, const bf16* x, T* out, float* sums) {
  const Blocks blocks = blocks_of(a);
  const int64_t rows_of_block = blocks.rows, columns_of_block = blocks.columns;
  const int64_t row_blocks = (a.N + rows_of_block - 1) / rows_of_block;
  const int64_t column_blocks = (a.K + columns_of_block - 1) / columns_of_block;
#pragma omp parallel num_threads(a.threads)
  {
    const TileConfig config;
    const Buffer<Unit> left(rows_of_block * kGradientDepth / 2), right(columns_of_block * kGradientDepth / 2);
    const Buffer<float> c(rows_of_block * columns_of_block), totals(rows_of_block);
    const Store<T> write{out, a.K, a.add};
    Pipeline<Store<T>> pipeline(write);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < row_blocks * column_blocks; ++block) {
      const int64_t first = block % row_blocks * rows_of_block, rows = std::min(rows_of_block, a.N - first);
      const int64_t column = block / row_blocks * columns_of_block, columns = std::min(columns_of_block, a.K - column);
      const int64_t panels = (rows + kSide - 1) / kSide, strips = (columns + kSide - 1) / kSide;
      const bool with_sums = sums != nullptr && column == 0;
      std::fill_n(totals.get(), rows_of_block, 0.0f);
      for (int64_t m = 0; m < a.M; m += kGradientDepth) {
        const int64_t depth = std::min(kGradientDepth, a.M - m), here = steps_of(depth), apart = here * kStep;
        pack_left_transposed(dy + m * a.dy_stride + first, a.dy_stride, depth, rows, here, left.get(),
                             with_sums ? totals.get() : nullptr);
        pack_right(x + m * a.x_stride + column, a.x_stride, depth, columns, here, right.get(), apart);
        for (int64_t i = 0; i < strips; ++i)
          for (int64_t p = 0; p < panels; ++p) {
            float* square = c.get() + (i * panels + p) * kSquare;
            pipeline.run(packed(left.get() + p * apart), right.get() + i * apart, here, square, m == 0,
                         m + depth == a.M,
                         {square, first + p * kSide, std::min(kSide, rows - p * kSide), column + i * kSide,
                          std::min(kSide, columns - i * kSide)});
          }
      }
      pipeline.drain();
      for (int64_t n = 0; with_sums && n < rows_of_block; ++n) {
        const int64_t row = n / kSide * kSide + unpacked_column(n % kSide / kLanes, n % kLanes);
        if (row < rows) sums[first + row] = totals.get()[n];
      }
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
  require(!a.derivative || (a.activation != kNone && pre != 0 && bias == 0 && residual == 0 && pre != y),
          "linear: the derivative is that of an activation, with pre beside y, without bias and residual");
  require(a.K <= kDeepest, "linear: K must be at most " + std::to_string(kDeepest) + ", got " + std::to_string(a.K));
#if defined(__x86_64__)
  const auto with = [&](auto kind, auto slope) {
    const Finish<kind, slope> finish{reinterpret_cast<const float*>(bias), reinterpret_cast<const bf16*>(residual),
                                     reinterpret_cast<bf16*>(pre), reinterpret_cast<bf16*>(y), a.N};
    const bf16* rows = reinterpret_cast<const bf16*>(x);
    if (a.weight_dtype == kBFloat16) return linear(a, rows, reinterpret_cast<const bf16*>(weight), finish);
    return linear(a, rows, reinterpret_cast<const float*>(weight), finish);
  };
  const auto run = [&](auto kind) {
    if (a.derivative) return with(kind, std::true_type());
    return with(kind, std::false_type());
  };
  switch (a.activation) {
    case kGelu: return run(std::integral_constant<int, kGelu>());
    case kGeluTanh: return run(std::integral_constant<int, kGeluTanh>());
    case kReluSquared: return run(std::integral_constant<int, kReluSquared>());
    case kSilu: return run(std::integral_constant<int, kSilu>());
    default: return with(std::integral_constant<int, kNone>(), std::false_type());
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
