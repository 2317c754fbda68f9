// Building blocks of attention: matrix products of packed operands, packing, visibility, dropout, for one tile.
//
// A tile is kQueries query rows x up to kKeys keys. Scores are kept transposed, s[key][query]: 16 queries are the lanes
// of a vector, so that softmax needs no sum over lanes. Operands of a product are arrays of 32-bit units, 1 fp32 or 2
// bf16 along the summed dimension. The left operand of a product is read one unit at a time and broadcast, from any
// layout; the right one is packed with the lanes last. Head dims are padded with zeros to a multiple of 16.
//
// Products on AMX tiles read 16 rows of 16 units of the left operand, so its units must be neighbours. Where a tile of
// probabilities would be the left operand with rows of queries, the transposed product is made instead.
#pragma once

#include <cmath>
#include <cstdlib>
#include <new>

#include "attention.h"
#if defined(MEGAKERN_AMX)
#include "amx.h"
#endif
#include "simd.h"

namespace megakern {
namespace {

constexpr int kQueries = 32;
constexpr int kQueryVectors = kQueries / kLanes;
constexpr int kKeys = 64;
constexpr int kAhead = 32;   // rows fetched ahead while packing
constexpr int kRowStep = 8;  // rows of a product that are made at a time

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr float kNoMaximum = -1e30f;  // finite, so that a row of -inf gives no NaN

MEGAKERN_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory on cache lines, of one thread, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t units) : data_(static_cast<Unit*>(std::aligned_alloc(64, round_up(units, 16) * 4))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator Unit*() { return data_; }
  float* floats() { return reinterpret_cast<float*>(data_); }

 private:
  Unit* data_;
};

// --- products in fp32 and in bf16 ---

struct InFloat32 {
  static constexpr bool kTiles = false;
  static constexpr int kGroup = 1;      // elements in a unit
  static constexpr int kKeyStep = 8;    // key counts are padded to a multiple of it
  static constexpr int kDepthStep = 16;  // head dims too
  struct Config {};
  static constexpr Accuracy kAccuracy = kExact;
  static MEGAKERN_INLINE Vec multiply_add(Vec c, Unit a, __m512i b) {
    return fma(_mm512_castsi512_ps(_mm512_set1_epi32(a)), _mm512_castsi512_ps(b), c);
  }
};

#if defined(MEGAKERN_AVX512_BF16)
struct InBfloat16 {
  static constexpr bool kTiles = false;
  static constexpr int kGroup = 2;
  static constexpr int kKeyStep = 8;
  static constexpr int kDepthStep = 16;
  struct Config {};
  static constexpr Accuracy kAccuracy = kFast;
  static MEGAKERN_INLINE Vec multiply_add(Vec c, Unit a, __m512i b) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
};
#endif

#if defined(MEGAKERN_AMX)
struct InTiles {
  static constexpr bool kTiles = true;
  static constexpr int kGroup = 2;
  static constexpr int kKeyStep = 32;
  static constexpr int kDepthStep = 32;
  static constexpr Accuracy kAccuracy = kFast;
  using Config = TileConfig;  // of the thread
};
#endif

struct Left {  // element (row, unit) is at data[row * by_row + unit * by_unit]
  const Unit* data;
  int64_t by_row, by_unit;
};

enum Write { kSet, kAdd, kScaleAndAdd };  // c = ab, c += ab, c = factor[row] c + ab

template <class Product, int rows, int vectors, Write write>
MEGAKERN_INLINE void product_tile(Left a, const Unit* b, int64_t b_step, float* c, int64_t c_step, int64_t units,
                                  const float* factor) {
  Vec sums[rows][vectors];
  for (auto& row : sums)
    for (Vec& sum : row) sum = _mm512_setzero_ps();
  for (int64_t u = 0; u < units; ++u) {
    __m512i right[vectors];
    for (int n = 0; n < vectors; ++n) {
      right[n] = _mm512_load_si512(b + u * b_step + n * kLanes);
    }
    for (int m = 0; m < rows; ++m) {
      const Unit left = a.data[m * a.by_row + u * a.by_unit];
      for (int n = 0; n < vectors; ++n) sums[m][n] = Product::multiply_add(sums[m][n], left, right[n]);
    }
  }
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < vectors; ++n) {
      float* place = c + m * c_step + n * kLanes;
      Vec sum = sums[m][n];
      if constexpr (write == kAdd) sum = _mm512_add_ps(sum, _mm512_load_ps(place));
      if constexpr (write == kScaleAndAdd) sum = fma(_mm512_load_ps(place), set1(factor[m]), sum);
      _mm512_store_ps(place, sum);
    }
  }
}

template <class Product, int vectors, Write write>
inline void product_columns(Left a, const Unit* b, int64_t b_step, float* c, int64_t c_step, int64_t rows,
                            int64_t units, const float* factor) {
  constexpr int step = vectors == 4 ? 4 : kRowStep;  // 16 to 24 sums: enough to hide the latency of a product
  for (int64_t m = 0; m < rows; m += step) {
    const Left part{a.data + m * a.by_row, a.by_row, a.by_unit};
    product_tile<Product, step, vectors, write>(part, b, b_step, c + m * c_step, c_step, units,
                                                write == kScaleAndAdd ? factor + m : nullptr);
  }
}

#if defined(MEGAKERN_AMX)
// rows, columns: multiples of 32; units: of 16. a.by_unit: 1.
template <Write write>
inline void product_of_tiles(Left a, const Unit* b, int64_t b_step, float* c, int64_t c_step, int64_t rows,
                             int64_t columns, int64_t units) {
  static_assert(write != kScaleAndAdd);
  const int64_t a_bytes = a.by_row * sizeof(Unit), b_bytes = b_step * sizeof(Unit), c_bytes = c_step * sizeof(float);
  for (int64_t m = 0; m < rows; m += 2 * kTileRows)
    for (int64_t n = 0; n < columns; n += 2 * kTileUnits) {
      float *upper = c + m * c_step + n, *lower = upper + kTileRows * c_step;
      if constexpr (write == kAdd) {
        tile_load<0>(upper, c_bytes), tile_load<1>(upper + kTileUnits, c_bytes);
        tile_load<2>(lower, c_bytes), tile_load<3>(lower + kTileUnits, c_bytes);
      } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      }
      for (int64_t u = 0; u < units; u += kTileUnits) {
        const Unit *left = a.data + m * a.by_row + u, *right = b + u * b_step + n;
        tile_load<4>(left, a_bytes), tile_load<6>(right, b_bytes);
        tile_multiply_add<0, 4, 6>();
        tile_load<7>(right + kTileUnits, b_bytes);
        tile_multiply_add<1, 4, 7>();
        tile_load<5>(left + kTileRows * a.by_row, a_bytes);
        tile_multiply_add<2, 5, 6>();
        tile_multiply_add<3, 5, 7>();
      }
      tile_store<0>(upper, c_bytes), tile_store<1>(upper + kTileUnits, c_bytes);
      tile_store<2>(lower, c_bytes), tile_store<3>(lower + kTileUnits, c_bytes);
    }
}
#endif

// c (rows, columns) from a (rows, units) and b (units, columns). rows: a multiple of 8, columns: of 16.
template <class Product, Write write>
inline void product(Left a, const Unit* b, int64_t b_step, float* c, int64_t c_step, int64_t rows, int64_t columns,
                    int64_t units, [[maybe_unused]] const float* factor = nullptr) {
#if defined(MEGAKERN_AMX)
  if constexpr (Product::kTiles) return product_of_tiles<write>(a, b, b_step, c, c_step, rows, columns, units);
#else
  for (int64_t n = 0; n < columns;) {
    const int64_t left = (columns - n) / kLanes;
    const auto run = [&](auto function) { function(a, b + n, b_step, c + n, c_step, rows, units, factor); };
    const int64_t vectors = left == 4 || left >= 7 ? 4 : left >= 3 ? 3 : left;
    switch (vectors) {
      case 4: run(product_columns<Product, 4, write>); break;
      case 3: run(product_columns<Product, 3, write>); break;
      case 2: run(product_columns<Product, 2, write>); break;
      default: run(product_columns<Product, 1, write>); break;
    }
    n += vectors * kLanes;
  }
#endif
}

// --- packing ---

// 16 elements from p on as the units of a row: 16 of fp32 or 8 of bf16.
template <class Product>
MEGAKERN_INLINE void pack_16(const float* p, Mask m, Unit* to) {
  static_assert(Product::kGroup == 1);
  _mm512_store_ps(reinterpret_cast<float*>(to), load(p, m));
}
template <class Product>
MEGAKERN_INLINE void pack_16(const bf16* p, Mask m, Unit* to) {
  if constexpr (Product::kGroup == 1) {
    _mm512_store_ps(reinterpret_cast<float*>(to), load(p, m));
  } else {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(m, p));
  }
}

// The rows of a head are far apart, so the processor does not fetch them ahead by itself.
template <typename T>
MEGAKERN_INLINE void fetch_row(const T* row, int64_t depth) {
  for (int64_t d = 0; d < depth; d += 64 / static_cast<int64_t>(sizeof(T)))
    _mm_prefetch(reinterpret_cast<const char*>(row + d), _MM_HINT_T0);
}

// to (padded, D / group): rows of x, zeros from row `rows` on and from element `depth` on. D is depth rounded up.
// x has `following` rows, of which those after `rows` are fetched for the next call.
template <class Product, typename T>
inline void pack_rows(const T* x, int64_t by_row, int64_t rows, int64_t following, int64_t padded, int64_t depth,
                      Unit* to) {
  const int64_t D = round_up(depth, Product::kDepthStep), width = D / Product::kGroup;
  for (int64_t r = 0; r < padded; ++r) {
    if (r + kAhead < following) fetch_row(x + (r + kAhead) * by_row, depth);
    for (int64_t d = 0; d < D; d += kLanes) {
      const bool real = r < rows && d < depth;
      const Mask m = real ? first_lanes(depth - d) : Mask(0);
      pack_16<Product>(real ? x + r * by_row + d : x, m, to + r * width + d / Product::kGroup);
    }
  }
}

// to (rows / group, D): the same elements, with `group` neighbouring rows in a unit. `packed` is from pack_rows.
template <class Product>
inline void pack_columns(const Unit* packed, int64_t rows, int64_t D, Unit* to) {
  if constexpr (Product::kGroup == 2) {
    for (int64_t r = 0; r < rows; r += 2) {
      const Unit *even = packed + r * (D / 2), *odd = even + D / 2;
      for (int64_t d = 0; d < D; d += kLanes) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(even + d / 2)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(odd + d / 2)));
        _mm512_store_si512(to + r / 2 * D + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  } else {
    for (int64_t i = 0; i < rows * D; i += kLanes) _mm512_store_si512(to + i, _mm512_load_si512(packed + i));
  }
}

// --- a tile of probabilities or their gradients as operands ---

// Writes p[key][query] of two neighbouring keys: as rows of the keys, and (bf16 only) as units of two keys.
template <class Product>
MEGAKERN_INLINE void store_key_pair(const Vec (&p)[2][kQueryVectors], int64_t key, Unit* by_key,
                                    [[maybe_unused]] Unit* by_pair) {
  if constexpr (Product::kGroup == 1) {
    for (int i = 0; i < 2; ++i)
      for (int n = 0; n < kQueryVectors; ++n)
        _mm512_store_ps(reinterpret_cast<float*>(by_key) + (key + i) * kQueries + n * kLanes, p[i][n]);
  }
#if defined(MEGAKERN_AVX512_BF16)
  if constexpr (Product::kGroup == 2) {
    static_assert(kQueryVectors == 2);
    const __m512i odd_even = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    if (by_key != nullptr)
      for (int i = 0; i < 2; ++i)
        _mm512_store_si512(by_key + (key + i) * (kQueries / 2), (__m512i)_mm512_cvtne2ps_pbh(p[i][1], p[i][0]));
    if (by_pair != nullptr)
      for (int n = 0; n < kQueryVectors; ++n)
        _mm512_store_si512(by_pair + key / 2 * kQueries + n * kLanes,
                           _mm512_permutexvar_epi16(odd_even, (__m512i)_mm512_cvtne2ps_pbh(p[1][n], p[0][n])));
  }
#endif
}

// --- which keys a query sees, and which probabilities are dropped ---

struct Range {
  int64_t low, high;  // keys [low, high)
};

// The keys that query t of the problem sees; may be empty.
MEGAKERN_INLINE Range visible(const AttentionProblem& a, int64_t t) {
  const int64_t own = t + a.S - a.T;
  const int64_t low = a.left < 0 ? 0 : std::max<int64_t>(0, own - a.left);
  const int64_t high = a.right < 0 ? a.S : std::min<int64_t>(a.S, own + a.right + 1);
  return {low, std::max(low, high)};
}

// The kQueries rows from `first` on. Rows from T on are padding.
class QueryBlock {
 public:
  QueryBlock(const AttentionProblem& a, int64_t sample, int64_t head, int64_t first)
      : first(first), count(std::min<int64_t>(kQueries, a.T - first)), dropout_(a.dropout_p > 0) {
    alignas(64) int32_t low[kQueries], high[kQueries], key_low[kQueries], key_high[kQueries];
    const uint64_t key = dropout_ ? fold(fold(mix(a.seed), a.first_sample + sample), a.first_head + head) : 0;
    for (int64_t i = 0; i < kQueries; ++i) {
      const Range range = visible(a, std::min(first + i, a.T - 1));
      low[i] = static_cast<int32_t>(range.low), high[i] = static_cast<int32_t>(range.high);
      const uint64_t row = dropout_ ? fold(key, first + i) : 0;
      key_low[i] = static_cast<int32_t>(row), key_high[i] = static_cast<int32_t>(row >> 32);
    }
    keys = {low[0], high[0]};
    shared_ = keys;
    for (int64_t i = 0; i < count; ++i) {
      keys = {std::min<int64_t>(keys.low, low[i]), std::max<int64_t>(keys.high, high[i])};
      shared_ = {std::max<int64_t>(shared_.low, low[i]), std::min<int64_t>(shared_.high, high[i])};
    }
    for (int n = 0; n < kQueryVectors; ++n) {
      low_[n] = _mm512_load_si512(low + n * kLanes), high_[n] = _mm512_load_si512(high + n * kLanes);
      key_low_[n] = _mm512_load_si512(key_low + n * kLanes), key_high_[n] = _mm512_load_si512(key_high + n * kLanes);
    }
    threshold_ = _mm512_set1_epi32(a.dropout_threshold);
    kept_ = set1(1.0f / (1.0f - static_cast<float>(a.dropout_p)));
  }

  // Do all rows see all keys [first_key, last_key)?
  bool sees_all(int64_t first_key, int64_t last_key) const {
    return first_key >= shared_.low && last_key <= shared_.high;
  }

  MEGAKERN_INLINE Mask sees(int64_t key, int n) const {
    const __m512i j = _mm512_set1_epi32(static_cast<int>(key));
    return _mm512_cmple_epi32_mask(low_[n], j) & _mm512_cmplt_epi32_mask(j, high_[n]);
  }

  bool drops() const { return dropout_; }

  // x times the dropout factor of `key`: 0 or 1 / (1 - p). megakern/ops/dropout.py defines the bits.
  MEGAKERN_INLINE Vec dropped(Vec x, int64_t key, int n) const {
    __m512i bits = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(key) * 0x9E3779B9u));
    bits = _mm512_add_epi32(bits, key_low_[n]);
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
    bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32(0x7FEB352D));
    bits = _mm512_xor_si512(bits, key_high_[n]);
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 15));
    bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32(static_cast<int>(0x846CA68Bu)));
    return _mm512_maskz_mul_ps(_mm512_cmpge_epi32_mask(bits, threshold_), x, kept_);
  }

  const int64_t first, count;
  Range keys;  // that some row sees

 private:
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  static uint64_t fold(uint64_t key, uint64_t index) { return mix(key + (index + 1) * 0x9E3779B97F4A7C15u); }

  const bool dropout_;
  Range shared_;  // that all rows see
  __m512i low_[kQueryVectors], high_[kQueryVectors], key_low_[kQueryVectors], key_high_[kQueryVectors], threshold_;
  Vec kept_;
};

template <typename T>
MEGAKERN_INLINE T* head_of(const AttentionTensor& x, int64_t sample, int64_t head) {
  return reinterpret_cast<T*>(x.data) + sample * x.by_sample + head * x.by_head;
}

// to (count, depth), rows `by_row` apart, = x (count, D) times factor[row] (null: `all`).
template <typename T>
inline void store_rows(const float* x, int64_t D, int64_t count, int64_t depth, const float* factor, float all, T* to,
                       int64_t by_row) {
  for (int64_t r = 0; r < count; ++r) {
    const Vec f = set1(factor == nullptr ? all : factor[r]);
    for (int64_t d = 0; d < depth; d += kLanes)
      store(to + r * by_row + d, _mm512_mul_ps(_mm512_load_ps(x + r * D + d), f), first_lanes(depth - d));
  }
}

}  // namespace
}  // namespace megakern
