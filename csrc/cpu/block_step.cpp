// One transformer block over a few new tokens, in one parallel region: megakern/ops/block_step.py has the formulas.
//
// A step of generation takes the time in which its weights come from memory, if nothing else is in the way: one call a
// block instead of a dozen, and stages that are a barrier apart. Norms are made by every thread for itself, products are
// split by outputs (rows.h), attention by token and head. Values are rounded to `dtype` where the separate ops round.
// Writes with =. No result depends on the number of threads.
#include "block_step.h"

#include <cmath>
#include <utility>
#include <vector>

#include "checks.h"

#if defined(__x86_64__)
#include <omp.h>

#include "rows.h"

namespace megakern {
namespace {

template <typename T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// y (C,) = norm(x), which may be y.
template <typename T, typename V>
void norm_row(const T* x, const BlockNorm& norm, int64_t C, float eps, bool centre, T* y) {
  const V *weight = at<const V>(norm.weight), *bias = at<const V>(norm.bias);
  Vec sum = _mm512_setzero_ps();
  if (centre)
    for (int64_t c = 0; c < C; c += kLanes) sum = _mm512_add_ps(sum, load(x + c, first_lanes(C - c)));
  const Vec mean = set1(_mm512_reduce_add_ps(sum) / static_cast<float>(C));
  Vec squares = _mm512_setzero_ps();
  for (int64_t c = 0; c < C; c += kLanes) {
    const Mask m = first_lanes(C - c);
    const Vec centred = _mm512_maskz_sub_ps(m, load(x + c, m), mean);
    squares = fma(centred, centred, squares);
  }
  const Vec variance = set1(_mm512_reduce_add_ps(squares) / static_cast<float>(C) + eps);
  const Vec rstd = _mm512_div_ps(set1(1.0f), _mm512_sqrt_ps(variance));
  for (int64_t c = 0; c < C; c += kLanes) {
    const Mask m = first_lanes(C - c);
    const Vec normed = _mm512_mul_ps(_mm512_sub_ps(load(x + c, m), mean), rstd);
    store(y + c, fma(normed, load(weight + c, m), bias ? load(bias + c, m) : _mm512_setzero_ps()), m);
  }
}

// The halves of x (D,) are turned by the angles of one position.
template <typename T>
void rope_row(T* x, int64_t D, const float* cos, const float* sin) {
  const int64_t half = D / 2;
  for (int64_t d = 0; d < half; d += kLanes) {
    const Mask m = first_lanes(half - d);
    const Vec a = load(x + d, m), b = load(x + half + d, m), c = load(cos + d, m), s = load(sin + d, m);
    store(x + d, _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)), m);
    store(x + half + d, fma(b, c, _mm512_mul_ps(a, s)), m);
  }
}

// Keys or values of one sequence and head: row j lies in a page of the table.
template <typename T>
struct Cached {
  const T* pages;
  const int32_t* table;
  int64_t page_size, by_row, by_head;  // elements from one row, one head to the next
  const T* row(int64_t j) const { return pages + (table[j / page_size] * page_size + j % page_size) * by_row + by_head; }
};

constexpr int kMostVecs = 16;  // of a head, so D is at most 256

// out (D,) = softmax(scale q k^T) v over keys first .. last; scores: room for them. V is the number of vectors in D.
template <int V, typename T>
void attend(const T* q, const Cached<T>& keys, const Cached<T>& values, int64_t first, int64_t last, int64_t D,
            float* scores, T* out) {
  const Mask m = first_lanes(D - (V - 1) * kLanes);
  const auto lanes = [&](int v) { return v == V - 1 ? m : Mask(0xFFFF); };
  const Vec scale = set1(1.0f / std::sqrt(static_cast<float>(D)));
  Vec query[V];
  for (int v = 0; v < V; ++v) query[v] = _mm512_mul_ps(load(q + v * kLanes, lanes(v)), scale);
  const int64_t count = last - first + 1;
  float* score = scores;
  Vec highest = set1(-INFINITY);
  for (int64_t j = first; j <= last; j += kLanes) {
    __m512i sums[kLanes];  // 16 keys: the transpose adds them up lane by lane
    const int64_t here = std::min<int64_t>(kLanes, last - j + 1);
    for (int i = 0; i < kLanes; ++i) {
      Vec sum = _mm512_setzero_ps();
      if (i < here) {
        const T* key = keys.row(j + i);
        for (int v = 0; v < V; ++v) sum = fma(query[v], load(key + v * kLanes, lanes(v)), sum);
      }
      sums[i] = _mm512_castps_si512(sum);
    }
    transpose_16(sums);
    Vec total = _mm512_castsi512_ps(sums[0]);
    for (int i = 1; i < kLanes; ++i) total = _mm512_add_ps(total, _mm512_castsi512_ps(sums[i]));
    total = _mm512_mask_mov_ps(set1(-INFINITY), first_lanes(here), total);
    highest = _mm512_max_ps(highest, total);
    store(score, total);
    score += kLanes;
  }
  const Vec peak = set1(_mm512_reduce_max_ps(highest));
  Vec sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec p = exp<kExact>(_mm512_sub_ps(load(scores + j), peak));
    store(scores + j, p);
    sum = _mm512_add_ps(sum, p);
  }
  const Vec share = set1(1.0f / _mm512_reduce_add_ps(sum));
  Vec total[V];
  for (int v = 0; v < V; ++v) total[v] = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; ++j) {
    const T* value = values.row(first + j);
    const Vec p = set1(scores[j]);
    for (int v = 0; v < V; ++v) total[v] = fma(p, load(value + v * kLanes, lanes(v)), total[v]);
  }
  for (int v = 0; v < V; ++v) store(out + v * kLanes, _mm512_mul_ps(total[v], share), lanes(v));
}

template <typename T>
using Attend = void (*)(const T*, const Cached<T>&, const Cached<T>&, int64_t, int64_t, int64_t, float*, T*);

template <typename T>
Attend<T> attend_for(int64_t D) {
  static constexpr Attend<T> kTable[kMostVecs] = {
      attend<1, T>, attend<2, T>,  attend<3, T>,  attend<4, T>,  attend<5, T>,  attend<6, T>,  attend<7, T>,  attend<8, T>,
      attend<9, T>, attend<10, T>, attend<11, T>, attend<12, T>, attend<13, T>, attend<14, T>, attend<15, T>, attend<16, T>};
  return kTable[(D + kLanes - 1) / kLanes - 1];
}

// inner (M, F) = silu(x gate^T + bias) * (x up^T + bias) for this thread's share.
template <typename W, typename T, typename V>
void gated_share(const BlockLinear& gate, const BlockLinear& up, int64_t F, int64_t C, const float* x, int M, T* inner,
                 int id, int count) {
  using Stored = typename W::Stored;
  alignas(64) float gates[kMostRows * kBlock], ups[kMostRows * kBlock];
  const Share share((F + kBlock - 1) / kBlock, id, count);
  for (int64_t n = share.first * kBlock; n < std::min(share.last * kBlock, F); n += kBlock) {
    const int64_t rows = std::min(kBlock, F - n);
    const Mask mask = first_lanes(rows);
    block_sums<W>(at<const Stored>(gate.weight) + n * C, rows, C, x, padded(C), M, gates);
    block_sums<W>(at<const Stored>(up.weight) + n * C, rows, C, x, padded(C), M, ups);
    const auto bias = [&](Address a) { return a ? load(at<const V>(a) + n, mask) : _mm512_setzero_ps(); };
    const Vec gate_bias = bias(gate.bias), up_bias = bias(up.bias);
    for (int m = 0; m < M; ++m) {
      const Vec g = _mm512_add_ps(load(gates + m * kBlock), gate_bias);
      const Vec u = _mm512_add_ps(load(ups + m * kBlock), up_bias);
      store(inner + m * F + n, _mm512_mul_ps(activate<kSilu, kAccuracyOf<T>>(g), u), mask);
    }
  }
}

template <typename W, typename T, typename V>
void run(const BlockShape& s, const BlockWeights& w, const BlockCache& cache, const BlockRope& rope, const T* hidden,
         T* out, int threads) {
  using Stored = typename W::Stored;
  const int64_t n = s.H / s.G, width = s.G * (n + 2) * s.D, HD = s.H * s.D;
  const int M = static_cast<int>(s.B * s.T);
  const int32_t *table = at<const int32_t>(cache.block_table), *lengths = at<const int32_t>(cache.lengths);
  const int64_t longest = *std::max_element(lengths, lengths + s.B);
  T *keys = at<T>(cache.keys), *values = at<T>(cache.values);
  const auto position = [&](int m) { return lengths[m / s.T] - s.T + m % s.T; };
  const auto cached = [&](const T* pages, int m, int64_t g) {
    return Cached<T>{pages, table + m / s.T * cache.P, cache.page_size, s.G * s.D, g * s.D};
  };
  std::vector<T> qkv(M * width), o(M * HD), middle(M * s.C), inner(M * s.F);
  const int64_t room = M * padded(std::max({s.C, HD, s.F})), score_room = longest + 2 * kLanes;
  std::vector<float> wide(threads * room), scores(threads * score_room);
  std::vector<T> normed(threads * M * s.C);
  const Attend<T> attend_one = attend_for<T>(s.D);
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), count = omp_get_num_threads();
    float *x = wide.data() + id * room, *own_scores = scores.data() + id * score_room;
    T* y = normed.data() + id * M * s.C;
    const auto lay_out_rows = [&](const T* rows, int64_t K) {
      for (int m = 0; m < M; ++m) lay_out<W>(rows + m * K, K, x + m * padded(K));
    };
    const auto norm_rows = [&](const T* rows, const BlockNorm& norm) {
      for (int m = 0; m < M; ++m) norm_row<T, V>(rows + m * s.C, norm, s.C, s.eps, s.centre, y + m * s.C);
      lay_out_rows(y, s.C);
    };
    const auto product = [&](const BlockLinear& linear, int64_t N, int64_t K, int activation, const T* residual, T* to) {
      product_share<W>(at<const Stored>(linear.weight), at<const V>(linear.bias), N, K, x, M, activation, residual,
                       static_cast<T*>(nullptr), to, id, count);
    };

    norm_rows(hidden, w.norm1);
    product(w.qkv, width, s.C, kNone, nullptr, qkv.data());
#pragma omp barrier
    const Share heads(M * s.G * (n + 2), id, count);  // each head of each token: norm, rope, into the pages
    for (int64_t i = heads.first; i < heads.last; ++i) {
      const int m = static_cast<int>(i / (s.G * (n + 2)));
      const int64_t g = i / (n + 2) % s.G, place = i % (n + 2), at_position = position(m);
      T* head = qkv.data() + i * s.D;
      const BlockNorm& norm = place < n ? w.q_norm : w.k_norm;
      if (place <= n && norm.weight) norm_row<T, V>(head, norm, s.D, s.head_eps, false, head);
      if (place <= n && rope.cos)
        rope_row(head, s.D, at<const float>(rope.cos) + at_position * (s.D / 2),
                 at<const float>(rope.sin) + at_position * (s.D / 2));
      if (place < n) continue;
      T* to = const_cast<T*>(cached(place == n ? keys : values, m, g).row(at_position));
      std::copy(head, head + s.D, to);
    }
#pragma omp barrier
    const Share queries(M * s.H, id, count);
    for (int64_t i = queries.first; i < queries.last; ++i) {
      const int m = static_cast<int>(i / s.H);
      const int64_t h = i % s.H, g = h / n, last = position(m);
      const int64_t first = s.window < 0 ? 0 : std::max<int64_t>(0, last - s.window);
      const T* q = qkv.data() + ((m * s.G + g) * (n + 2) + h % n) * s.D;
      attend_one(q, cached(keys, m, g), cached(values, m, g), first, last, s.D, own_scores, o.data() + i * s.D);
    }
#pragma omp barrier
    lay_out_rows(o.data(), HD);
    product(w.proj, s.C, HD, kNone, hidden, middle.data());
#pragma omp barrier
    s.parallel_residual ? lay_out_rows(y, s.C) : norm_rows(middle.data(), w.norm2);
    if (s.gated)
      gated_share<W, T, V>(w.fc1, w.up, s.F, s.C, x, M, inner.data(), id, count);
    else
      product(w.fc1, s.F, s.C, s.activation, nullptr, inner.data());
#pragma omp barrier
    lay_out_rows(inner.data(), s.F);
    product(w.fc2, s.C, s.F, kNone, middle.data(), out);
  }
}

}  // namespace
}  // namespace megakern
#endif

namespace megakern {
namespace {

void check_shape(const char* op, const BlockShape& s, const BlockCache& cache, const BlockRope& rope) {
  const std::pair<const char*, int64_t> sizes[] = {{"B", s.B}, {"T", s.T}, {"C", s.C},         {"H", s.H},
                                                   {"G", s.G}, {"D", s.D}, {"F", s.F},         {"P", cache.P},
                                                   {"pages", cache.pages}, {"page_size", cache.page_size}};
  for (const auto& [name, size] : sizes) require_positive(op, name, size);
  require(s.B <= 8 && s.T <= 8 && s.B * s.T <= 8, "block_step: B T must be at most 8, got " + std::to_string(s.B) +
                                                       " x " + std::to_string(s.T));
  require(s.H % s.G == 0, "block_step: G must divide H");
  require(s.D <= 256, "block_step: D must be at most 256, got " + std::to_string(s.D));
  require(s.activation >= kNone && s.activation <= kSilu,
          "block_step: activation code must be 0 to 4, got " + std::to_string(s.activation));
  require(!rope.cos || s.D % 2 == 0, "block_step: rope needs an even D");
  require((rope.cos != 0) == (rope.sin != 0), "block_step: cos and sin come in pairs");
  require_addressable(op, s.C, 3 * std::max(s.H * s.D, s.F));
  require_addressable(op, cache.pages, cache.page_size * s.G * s.D);
}

// Every position that is read or written lies in a page that is there, and in the tables of rope.
void check_places(const BlockShape& s, const BlockCache& cache, const BlockRope& rope) {
  const auto* table = reinterpret_cast<const int32_t*>(cache.block_table);
  const auto* lengths = reinterpret_cast<const int32_t*>(cache.lengths);
  for (int64_t b = 0; b < s.B; ++b) {
    require(lengths[b] >= s.T && lengths[b] <= cache.P * cache.page_size,
            "block_step: lengths must be between T = " + std::to_string(s.T) + " and " +
                std::to_string(cache.P * cache.page_size) + ", the keys of the table, got " + std::to_string(lengths[b]));
    require(!rope.cos || lengths[b] <= rope.positions,
            "block_step: cos and sin have " + std::to_string(rope.positions) + " positions, too few for a length of " +
                std::to_string(lengths[b]));
    for (int64_t p = 0; p * cache.page_size < lengths[b]; ++p) {
      const int32_t page = table[b * cache.P + p];
      require(page >= 0 && page < cache.pages, "block_step: pages named in block_table must be between 0 and " +
                                                   std::to_string(cache.pages - 1) + ", got " + std::to_string(page));
    }
  }
}

}  // namespace

void block_step(const BlockShape& s, const BlockWeights& w, const BlockCache& cache, const BlockRope& rope,
                Address hidden, Address out, int dtype, int weight_dtype, int threads) {
  const char* op = "block_step";
  check_shape(op, s, cache, rope);
  require_dtype(op, dtype);
  require_dtype(op, weight_dtype);
  require(weight_dtype == kFloat32 || weight_dtype == dtype, "block_step: weights must be fp32 or of hidden's dtype");
  require_positive(op, "threads", threads);
  const int size = element_size(dtype), weight_size = element_size(weight_dtype);
  const std::pair<const char*, Address> states[] = {
      {"hidden", hidden}, {"out", out}, {"keys", cache.keys}, {"values", cache.values}};
  for (const auto& [name, address] : states) require_address(op, name, address, size);
  require_address(op, "block_table", cache.block_table, 4);
  require_address(op, "lengths", cache.lengths, 4);
  if (rope.cos) require_address(op, "cos", rope.cos, 4);
  if (rope.sin) require_address(op, "sin", rope.sin, 4);
  const std::pair<const char*, Address> weights[] = {
      {"norm1", w.norm1.weight}, {"qkv", w.qkv.weight}, {"proj", w.proj.weight}, {"fc1", w.fc1.weight},
      {"fc2", w.fc2.weight}};
  for (const auto& [name, address] : weights) require_address(op, name, address, weight_size);
  if (!s.parallel_residual) require_address(op, "norm2", w.norm2.weight, weight_size);
  if (s.gated) require_address(op, "up", w.up.weight, weight_size);
  for (const Address bias : {w.norm1.bias, w.norm2.bias, w.qkv.bias, w.proj.bias, w.fc1.bias, w.up.bias, w.fc2.bias,
                             w.q_norm.weight, w.k_norm.weight})
    if (bias) require_address(op, "a bias or a norm of heads", bias, weight_size);
  const Address bytes = s.B * s.T * s.C * size;
  require(hidden + bytes <= out || out + bytes <= hidden, "block_step: hidden and out overlap");
  check_places(s, cache, rope);
#if defined(__x86_64__)
  const auto call = [&](auto weight, auto* values, auto* vectors) {
    using T = std::remove_pointer_t<decltype(values)>;
    run<decltype(weight), T, std::remove_pointer_t<decltype(vectors)>>(
        s, w, cache, rope, reinterpret_cast<const T*>(hidden), reinterpret_cast<T*>(out), threads);
  };
  float* wide = nullptr;
  bf16* narrow = nullptr;
  if (dtype == kFloat32) return call(Plain32{}, wide, wide);
  if (weight_dtype == kFloat32) return call(Rounded32{}, narrow, wide);
  return call(Plain16{}, narrow, narrow);
#else
  require(false, "block_step: compiled for x86-64 only");
#endif
}

}  // namespace megakern
